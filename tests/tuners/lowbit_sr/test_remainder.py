"""Error feedback gives back what it kept, whatever the learning rate has become since."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from peft_lrqat import LowBitAdamW
from peft_lrqat.grid import Grid
from peft_lrqat.tuners.lowbit_sr import LowBitTensor


@pytest.mark.parametrize("rate", ["float", "tensor", "reloaded"])
def test_error_feedback_survives_a_learning_rate_that_rises_again(rate: str):
    """A cosine with a warm restart on a quadratic with noise: the distance from its minimum, in grid steps."""
    grid = Grid(4, -1, True)
    scale = torch.full((32, 1), 0.1)
    weight = nn.Parameter(LowBitTensor.from_codes(torch.zeros(32, 64, dtype=torch.int8), scale, grid, key=1))
    target = (torch.rand(32, 64) - 0.5) * 0.6
    optimizer = LowBitAdamW([weight], lr=1.0, error_feedback=True)
    away = []
    for step in range(200):
        lr = 0.002 * (1 + math.cos(math.pi * (step % 100) / 100))
        if rate == "reloaded" and step == 100:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = LowBitAdamW([weight], lr=1.0, error_feedback=True)
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = torch.tensor(lr) if rate == "tensor" else lr
        weight.grad = weight.detach().float() - target + 0.1 * torch.randn(32, 64)
        optimizer.step()
        away.append(((weight.detach().float() - target) / 0.1).square().mean().sqrt())
    assert max(away[100:120]) < 1.3 * away[98]
