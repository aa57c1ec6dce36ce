"""What LR-QAT has of LoRA's surface beyond `common/test_peft_features.py`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from transformers import PreTrainedModel

from tests.lrqat import GRID, IDS, layers, random_adapter
from tests.models import adapted, logits, tiny, train


def test_rank_and_alpha_patterns():
    model = adapted(
        tiny(), **GRID, r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={r".*layers\.1\.mlp\..*": 1}
    )
    for name, layer in layers(model).items():
        assert layer.r["default"] == (2 if "q_proj" in name else 4)
        assert layer.lora_A["default"].weight.shape[0] == layer.r["default"]
        alpha = 1 if "layers.1.mlp" in name else 8
        assert layer.scaling["default"] == alpha / layer.r["default"]


def test_trainable_tokens_of_a_tied_model_act_on_both_ends():
    model = adapted(tiny(tie=True), **GRID, trainable_token_indices=[3, 5], ensure_weight_tying=True)
    train(model, torch.tensor([[3, 5, 7, 9]]))
    inner = model.base_model.model
    both = (inner.model.embed_tokens.token_adapter, inner.lm_head.token_adapter)
    assert torch.equal(both[0].get_merged_weights(["default"]), both[1].get_merged_weights(["default"]))
    assert torch.equal(logits(copy.deepcopy(model).merge_and_unload(), IDS), logits(model, IDS))


def test_hotswapping_is_refused_by_peft(base: PreTrainedModel, tmp_path: Path):
    model = random_adapter(base)
    model.save_pretrained(tmp_path)
    before = logits(model, IDS)
    with pytest.raises(ValueError, match="otswap"):
        hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(logits(model, IDS), before)
