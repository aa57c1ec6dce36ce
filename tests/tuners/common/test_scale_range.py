"""Scales that training moves out of what a checkpoint holds: said at evaluation and saving, refused by merging."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_lrqat import export
from tests.models import logits, tiny

LAYER = "model.layers.1.mlp.up_proj"
SAID = (
    r"^1 scales in 1 layers, e.g. '.*layers.1.mlp.up_proj', have left what `scale_dtype='auto'` holds.*Merging refuses"
)


def trained(method: ModuleType, **options) -> tuple[PeftModel, torch.Tensor]:
    """A model and the scale shifts of one of its layers."""
    model = get_peft_model(tiny(), method.config(learn_scales=True, **options)).train()
    layer = method.layers(model)[f"base_model.model.{LAYER}"]
    found = getattr(layer, "lora_scale_shift", None) or layer.lowbitsr_scale_shift
    return model, found["default"].weight.data


@pytest.mark.parametrize("shift", [-1.0, -3.0, 1e9, float("inf"), float("nan"), -1 + 1e-7])
def test_a_scale_that_has_left_its_range(method: ModuleType, shift: float, tmp_path: Path):
    model, shifts = trained(method)
    shifts[2, 1] = shift
    with pytest.warns(UserWarning, match=SAID):
        model.eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*have left what")
        model.eval()  # said once
        model.train()
    with pytest.warns(UserWarning, match=SAID):
        model.save_pretrained(tmp_path / "adapter")
    before = logits(model, method.IDS)
    for merge in (model.merge_adapter, lambda: export(model, tmp_path / "out"), model.merge_and_unload):
        with pytest.raises(ValueError, match=rf"cannot be merged: 1 scales of '{LAYER}' have left what"):
            merge()
    assert not (tmp_path / "out").exists()
    assert torch.equal(logits(model, method.IDS).nan_to_num(), before.nan_to_num())


def test_scales_within_their_range_are_left_alone(method: ModuleType, tmp_path: Path):
    model, shifts = trained(method)
    shifts.uniform_(-0.9, 3.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*have left what")
        model.eval()
        model.save_pretrained(tmp_path)
    expected = logits(model, method.IDS)
    assert torch.equal(logits(model.merge_and_unload(), method.IDS), expected)


def test_weights_that_are_all_zero_start_at_the_end(method: ModuleType):
    model = tiny()
    model.get_parameter(f"{LAYER}.weight").data[3] = 0
    model = get_peft_model(model, method.config(learn_scales=True))
    layer = method.layers(model)[f"base_model.model.{LAYER}"]
    found = getattr(layer, "lora_scale_shift", None) or layer.lowbitsr_scale_shift
    found["default"].weight.data[3] = -0.01  # of nothing
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*have left what")
        model.eval()
    model.merge_and_unload()


def test_other_adapters_do_not_matter(method: ModuleType):
    model, shifts = trained(method)
    model.add_adapter("other", method.config(learn_scales=True))
    shifts[0] = -2
    model.set_adapter("other")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*have left what")
        model.eval()
    model.merge_adapter(["other"])
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter(["default"])


@pytest.mark.parametrize(
    ("dtype", "fits", "not_any_more"),
    [
        ("fp16", 60000.0, 70000.0),
        ("fp16", 2.0**-23, 2.0**-26),
        ("bf16", 1e38, 3.395e38),
        ("fp32", 1e-37, 1e-39),
        ("auto", 6e4, 7e4),
    ],
)
def test_each_dtype_has_its_range(method: ModuleType, dtype: str, fits: float, not_any_more: float):
    model, shifts = trained(method, scale_dtype=dtype)
    layer = method.layers(model)[f"base_model.model.{LAYER}"]
    start, _ = layer._trained_scales(["default"])
    for value, lost in ((fits, 0), (not_any_more, 1)):
        shifts.zero_()
        if value < 1:  # a shift near -1 has no room for it
            start[0, 0], shifts[0, 0] = 64 * value, -63 / 64
        else:
            start[0, 0], shifts[0, 0] = 1.0, value - 1
        if method.NAME == "LR-QAT":
            layer.frozen.scale0_bits.data.copy_(start.view(torch.int32))
        assert int(layer.scales_lost()) == lost
