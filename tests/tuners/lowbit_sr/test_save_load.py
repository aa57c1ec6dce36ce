"""Options of low-bit SR survive. (`common/test_save_load.py` has what both methods promise.)"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_lrqat.tuners.lowbit_sr import LowBitTensor
from tests.lowbit_sr import layers
from tests.models import logits, low_bit, tokens, train

IDS = tokens()


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 1.58, "group_size": 0, "act_bits": 8},
        {"bits": 2, "group_size": 16, "learn_scales": True, "error_feedback": True, "train_scales": True},
        {"bits": 8, "forward_bits": 1.58, "scale_dtype": "bf16"},
        {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 4, 5]},
        {"keep_base": False, "seed": 5, "exclude_modules": ["down_proj"]},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option_survives(base_folder: Path, tmp_path: Path, options: dict):
    options = {key: value for key, value in options.items() if key != "train_scales"}
    if options.pop("error_feedback", False):
        # the test's AdamW knows nothing of it; the flag itself must survive
        model = low_bit(load(base_folder), **options, error_feedback=True)
    else:
        model = low_bit(load(base_folder), **options)
        train(model, IDS, steps=2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(base_folder), tmp_path).eval()
    assert torch.equal(logits(again, IDS), logits(model.eval(), IDS))
    saved, here = again.peft_config["default"].to_dict(), model.peft_config["default"].to_dict()
    assert saved == {**here, "inference_mode": True}
    feedback = [p.error_feedback for p in again.parameters() if isinstance(p, LowBitTensor)]
    assert set(feedback) == {model.peft_config["default"].error_feedback}


def test_saving_and_loading_build_no_float_weight(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = low_bit(load(base_folder))

    def refuse(self: LowBitTensor) -> torch.Tensor:
        raise AssertionError("a float weight was built")

    monkeypatch.setattr(LowBitTensor, "to_float", refuse)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(load(base_folder), tmp_path)


@pytest.mark.parametrize("signed", [True, False])
def test_headroom_widens_the_scales_and_what_is_trained_is_what_is_served(
    base_folder: Path, tmp_path: Path, signed: bool
):
    model, plain = (
        low_bit(load(base_folder), bits=8, group_size=8, signed_scales=signed, headroom=headroom)
        for headroom in (4.0, 1.0)
    )
    for wide, narrow in zip(layers(model).values(), layers(plain).values(), strict=True):
        weight, before = (layer.lowbitsr_weight["default"].weight for layer in (wide, narrow))
        assert torch.equal(weight.scale, 4 * before.scale)
        assert weight.codes().abs().max() <= 33
    train(model, IDS)
    before = logits(model.eval(), IDS)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(base_folder), tmp_path).eval()
    assert again.peft_config["default"].headroom == 4
    assert torch.equal(logits(again, IDS), before)
    assert torch.equal(logits(again.merge_and_unload(), IDS), before)
