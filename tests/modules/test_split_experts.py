"""One packed layer for all experts, one for each, and back: the same integers."""

from __future__ import annotations

import copy

import pytest
import torch

from peft_lrqat.grid import Grid
from peft_lrqat.modules.experts import Experts
from peft_lrqat.modules.packed import QuantizedLinear, merged_layer
from peft_lrqat.modules.split_experts import joined_experts, parts_of, split_experts
from tests.grids import random_tensor
from tests.mixtures import EXPERTS, FIRST, mixture

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def packed(grid: Grid) -> Experts:
    experts = Experts(copy.deepcopy(mixture().get_submodule(FIRST)), PARTS)
    for name, (rows, columns) in {"gate_up_proj": (32, 32), "down_proj": (32, 16)}.items():
        weight = random_tensor(grid, EXPERTS * rows, columns)
        experts._modules[name] = merged_layer(weight, None, grid.code_bits, torch.bfloat16, experts=EXPERTS)
    return experts


@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(3, -1, symmetric=False)], ids=["groups", "zero points"])
def test_there_and_back(grid: Grid):
    experts = packed(grid)
    stacks = {name: experts.get_submodule(name) for name in PARTS}
    inputs = torch.randn(9, 32).bfloat16(), torch.randint(1, EXPERTS, (9, 2)), torch.rand(9, 2).bfloat16()
    expected = experts(*inputs)
    assert list(parts_of(experts))[:3] == ["0.gate_proj", "0.up_proj", "1.gate_proj"]
    split_experts(experts)
    assert torch.equal(experts(*inputs), expected)
    up: QuantizedLinear = experts.get_submodule("3.up_proj")
    whole, part = stacks["gate_up_proj"].grid_tensor(), up.grid_tensor()
    rows = slice(3 * 32 + 16, 4 * 32)
    assert torch.equal(part.codes, whole.codes[rows])
    assert torch.equal(part.scale, whole.scale[rows])
    again = joined_experts(experts)
    for name, stack in stacks.items():
        found, wanted = again.get_submodule(name).grid_tensor(), stack.grid_tensor()
        assert torch.equal(found.codes, wanted.codes)
        assert torch.equal(found.scale, wanted.scale)
        assert wanted.zero_point is None or torch.equal(found.zero_point, wanted.zero_point)
    assert torch.equal(again(*inputs), expected)


def test_experts_that_are_not_alike():
    experts = packed(Grid(4, 8))
    split_experts(experts)
    experts.get_submodule("1").up_proj = merged_layer(random_tensor(Grid(3, 8), 16, 32), None, 3, torch.bfloat16)
    with pytest.raises(ValueError, match=r"not alike in 'gate_up_proj'"):
        joined_experts(experts)


def test_a_float_adapter_on_one_expert_is_refused():
    experts = packed(Grid(4, 8))
    split_experts(experts)
    experts.get_submodule("1").up_proj = torch.nn.Linear(32, 16)
    with pytest.raises(ValueError, match=r"carries a Linear.*exclude_modules"):
        experts(torch.randn(2, 32).bfloat16(), torch.tensor([[0, 1], [1, 2]]), torch.rand(2, 2).bfloat16())
