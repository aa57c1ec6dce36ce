"""Low-bit SR's Triton kernels against the references: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat import LowBitAdamW
from peft_lrqat.grid import Grid
from peft_lrqat.lowbit_sr import LowBitTensor
from peft_lrqat.ops import use_kernels
from peft_lrqat.ops.low_bit import low_bit_linear, low_bit_weight, mean_code
from peft_lrqat.packing import pack
from peft_lrqat.rounding import random_words

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = (1.58, 2, 3, 4, 8)
STATES = ("8bit", "factored", "fp32")
SHAPES = {-1: (6, 300), 0: (5, 45), 9: (3, 45), 128: (5, 384), 256: (2, 512), 25: (1, 275)}


def weight(bits: float, group_size: int, shape: tuple[int, int]) -> LowBitTensor:
    """Random codes, from end to end of the grid."""
    grid = Grid(bits, group_size)
    codes = torch.randint(grid.qmin, grid.qmax + 1, shape, dtype=torch.int8)
    scale = torch.rand(grid.scale_shape(*shape)) * 0.02 + 0.01
    return LowBitTensor.from_codes(codes, scale, grid, -(2**62) - 12345678987654321).to(DEVICE)


def gradients(shape: tuple[int, int], steps: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Of many magnitudes, with zeros."""
    size = torch.logspace(-6, 1, shape[0]).unsqueeze(1) * torch.rand(1, shape[1])
    return [(torch.randn(shape) * size * (torch.rand(shape) > 0.1)).to(DEVICE, dtype) for _ in range(steps)]


def trained(kernels: bool, start: LowBitTensor, grads: list[torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """Everything that steps change, at the end."""
    p = nn.Parameter(start.clone())
    optimizer = LowBitAdamW([p], **options)
    with use_kernels(kernels):
        for grad in grads:
            p.grad = grad.float()
            if grad.dtype != torch.float32:  # no parameter has such a gradient, but the step takes it
                optimizer._step_codes(p, grad, optimizer.param_groups[0])
            else:
                optimizer.step()
    weight = p.detach()
    return {"packed": weight.packed, "scale": weight.scale, "stream": weight.stream, **optimizer.state[p]}


def check(start: LowBitTensor, grads: list[torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """Equal bit for bit; returns what it came to."""
    found, expected = (trained(kernels, start, grads, **options) for kernels in (True, False))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    return found


@pytest.mark.parametrize("error_feedback", [False, True])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("bits", BITS)
def test_steps_are_the_references_bit_for_bit(bits, state, error_feedback):
    for group_size, shape in SHAPES.items():
        start = weight(bits, group_size, shape)
        options = {"state": state, "error_feedback": error_feedback, "weight_decay": 0.1, "betas": (0.9, 0.98)}
        found = check(start, gradients(shape, 3), lr=0.01, **options)
        after = LowBitTensor(found["packed"], start.scale, start.stream, start.grid, shape[1])
        changed = after.codes() != start.codes()
        assert 0.01 < changed.float().mean() < 0.99
