"""Random weights of low-bit SR, for the tests of its operations."""

from __future__ import annotations

import torch

from peft_lrqat.grid import Grid
from peft_lrqat.tuners.lowbit_sr import LowBitTensor
from tests.grids import either_sign
from tests.problems import DEVICE


def weight(bits: float, group_size: int, shape: tuple[int, int]) -> LowBitTensor:
    """Random codes, from end to end of the grid, and scales of both signs."""
    grid = Grid(bits, group_size)
    codes = torch.randint(grid.qmin, grid.qmax + 1, shape, dtype=torch.int8)
    scale = either_sign(torch.rand(grid.scale_shape(*shape)) * 0.02 + 0.01, grid)
    return LowBitTensor.from_codes(codes, scale, grid, -(2**62) - 12345678987654321)


def kernel_weight(bits: float, group_size: int, shape: tuple[int, int]) -> LowBitTensor:
    """The same, where kernels are tested."""
    return weight(bits, group_size, shape).to(DEVICE)
