"""Integers as parameters: frozen whatever happens to the model, also in copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peft_lrqat.tuners.common.packed_parameter import PackedParameter, packed_state_dict, packs_state_dicts, weight_of


def test_it_stays_as_it_is():
    packed = PackedParameter(torch.arange(6, dtype=torch.int8).view(2, 3), requires_grad=True)
    module = nn.Linear(3, 2)
    module.register_parameter("base", packed)
    module.half()
    for found in (module.base, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert isinstance(found, PackedParameter)
        assert not found.requires_grad
        assert torch.equal(found, torch.arange(6, dtype=torch.int8).view(2, 3))


def test_gradients_of_integers_are_refused_in_words():
    module = nn.Linear(3, 2)
    module.register_parameter("base", PackedParameter(torch.zeros(2, 3, dtype=torch.int8)))
    assert module.requires_grad_(False).base.requires_grad_(False) is module.base
    with pytest.raises(RuntimeError, match=r"frozen base, which is integers.*`model\.set_adapter\(name\)`"):
        module.requires_grad_(True)


def test_state_dicts_are_packed_within_the_context_only():
    assert not packs_state_dicts()
    with packed_state_dict():
        assert packs_state_dicts()
    assert not packs_state_dicts()


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_the_weight_of_an_entry_is_what_its_module_says():
    entries = nn.ModuleDict({"default": nn.Linear(3, 2)})
    assert weight_of(entries, "other") is None
    assert weight_of(entries, "default") is entries["default"].weight
    plain = entries["default"].weight.detach().clone()
    nn.utils.parametrize.register_parametrization(entries["default"], "weight", Doubled())
    assert torch.equal(weight_of(entries, "default"), 2 * plain)
