"""Scales whose sign chooses the side on which the grid has one level more: on every road what positive ones are."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_lrqat import LRQATConfig, load_quantized
from tests.models import adapted, logits, tiny, train


def test_a_trained_model_is_the_merged_and_the_reloaded_one(method: ModuleType, tmp_path: Path):
    base = tiny(dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    model = method.adapt(base, **method.GRID, learn_scales=True)
    start = {name: layer.frozen.scale0.clone() for name, layer in method.layers(model).items()}
    train(model, method.IDS)
    for name, layer in method.layers(model).items():
        scale = layer.grid_tensor().scale
        assert not torch.equal(scale, start[name])
        assert torch.equal(scale.sign(), start[name].sign())
        assert 0.1 < (scale < 0).float().mean() < 0.9
    expected = logits(model, method.IDS)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, method.IDS), expected)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_quantized(tmp_path / "merged"), method.IDS), expected)
    again = PeftModel.from_pretrained(tiny(dtype=torch.bfloat16), tmp_path / "adapter")
    assert torch.equal(logits(again, method.IDS), expected)


def test_a_scale_that_training_moves_through_zero_is_lost_on_either_side(method: ModuleType):
    model = method.adapt(tiny(), **method.GRID, learn_scales=True)
    layer = next(iter(method.layers(model).values()))
    shifts = layer.lora_scale_shift if method.NAME == "LR-QAT" else layer.lowbitsr_scale_shift
    with torch.no_grad():
        shifts["default"].weight.fill_(-1.5)
    with pytest.raises(ValueError, match=f"{layer.frozen.scale0.numel()} scales of"):
        layer.grid_tensor()


def test_training_goes_on_from_negative_scales(tmp_path: Path):
    """The checkpoint of a trained model, as any foreign one with such scales."""
    merged = adapted(tiny(), bits=4, group_size=8, signed_scales=True).merge_and_unload()
    merged.save_pretrained(tmp_path)
    base = load_quantized(tmp_path)
    ids = torch.arange(8).view(1, 8)
    before = logits(base, ids)
    model = get_peft_model(base, LRQATConfig(r=4))
    assert model.peft_config["default"].scale_dtype == "auto"
    assert torch.equal(logits(model, ids), before)
    assert any((layer.scale0 < 0).any() for layer in model.modules() if hasattr(layer, "scale0"))
    train(model, ids)
    after = logits(model, ids)
    assert torch.equal(logits(model.merge_and_unload(), ids), after)
