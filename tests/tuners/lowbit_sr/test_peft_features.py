"""Random streams, moves, and a base that is dropped. (`common/test_peft_features.py`: PEFT's surface.)"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tests.lowbit_sr import GRID, IDS, layers, other, random_adapter
from tests.models import logits, low_bit, tiny, train


def test_each_layer_has_a_random_stream_of_its_own():
    def keys(**options) -> list[int]:
        model = low_bit(tiny(), **GRID, **options)
        return [int(layer.lowbitsr_weight["default"].weight.stream[0]) for layer in layers(model).values()]

    assert len(set(keys())) == len(keys()) == 14
    assert keys() == keys()
    assert not set(keys(seed=1)) & set(keys())


def test_delta_weights_are_how_far_training_went(base: PreTrainedModel):
    model = random_adapter(base)
    for layer in layers(model).values():
        moved = layer.lowbitsr_weight["default"].weight.to_float() - layer.get_base_layer().weight
        assert moved.abs().max() > 0
        assert torch.equal(layer.get_delta_weight("default"), moved)


# -- a base that was dropped


def test_without_a_base_one_adapter_trains_merges_and_says_what_is_gone(base: PreTrainedModel, tmp_path):
    twin = random_adapter(copy.deepcopy(base), init_weights=True)
    model = random_adapter(base, init_weights=True, keep_base=False)
    assert train(model, IDS) == train(twin, IDS)
    trained = logits(model, IDS)
    gone = r"`keep_base=False` dropped the base codes"
    with model.disable_adapter(), pytest.raises(ValueError, match=gone):
        logits(model, IDS)
    with pytest.raises(ValueError, match=gone):
        model.unload()
    with pytest.raises(ValueError, match=r"`keep_base=False` dropped the base codes.*'second'"):
        model.add_adapter("second", other(keep_base=False))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match=r"`keep_base=False` dropped"):
        next(iter(layers(model).values())).get_delta_weight("default")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(low_bit(tiny(), **GRID).unload(), tmp_path)
    assert torch.equal(logits(again.eval(), IDS), trained)
    assert torch.equal(logits(model.merge_and_unload(), IDS), trained)
