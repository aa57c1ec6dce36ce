"""One weight while its block is trained: gradients, and what is left behind is what the block computed with."""

from __future__ import annotations

import pytest
import torch

from peft_lrqat.calibration.block_weight import BlockWeight
from peft_lrqat.grid import Grid, grouped, quantize, sum_per_scale
from peft_lrqat.ranges import choose_range

GRIDS = [Grid(4, -1), Grid(3, 8), Grid(2, 16, False), Grid(7, 0, False), Grid(8, 8), Grid(8, -1, False), Grid(1.58, -1)]


def trained(grid: Grid, dtype: torch.dtype = torch.float32, scale_dtype: str = "auto") -> BlockWeight:
    """A weight of 6 x 48 somewhere in training: off its first values in every way."""
    made = BlockWeight((torch.randn(6, 48) * 0.1).to(dtype), grid, "lp", 2.5, scale_dtype, grid.symmetric)
    with torch.no_grad():
        made.weight += torch.randn_like(made.weight)
        made.scale_shift += 0.1 * torch.randn_like(made.scale_shift)
        if made.zero_point is not None:
            made.zero_point += torch.randn_like(made.zero_point)
    return made


@pytest.mark.parametrize("grid", GRIDS, ids=Grid.describe)
def test_it_starts_at_the_weight_rounded_to_nearest(grid: Grid):
    weight = torch.randn(6, 48) * 0.1
    found = BlockWeight(weight, grid, "lp", 2.5, "auto", grid.symmetric).fixed_point().rounded()
    scale, zero_point = choose_range(weight, grid, signed=grid.symmetric)
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.codes, quantize(weight, scale, zero_point, grid))


@pytest.mark.parametrize("grid", GRIDS, ids=Grid.describe)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_left_behind_is_what_was_trained(grid: Grid, dtype: torch.dtype):
    weight = trained(grid, dtype)
    left = weight.fixed_point()
    rounded = left.rounded()
    assert rounded.codes.min() >= grid.qmin
    assert rounded.codes.max() <= grid.qmax
    assert rounded.codes.unique().numel() > 2
    assert torch.equal(rounded.dequantize(dtype), weight().detach())
    if 2 <= grid.bits < 8:
        wide, step = left.eight_bits(), 2 ** (8 - grid.bits)
        assert torch.equal(wide.scale * step, rounded.scale)
        nearest = torch.floor((wide.codes.float() + step / 2) / step).clamp(grid.qmin, grid.qmax)
        assert torch.equal(nearest.to(torch.int8), rounded.codes)


@pytest.mark.parametrize("grid", GRIDS[:4], ids=Grid.describe)
def test_ties_and_small_scales_are_left_as_they_were_trained(grid: Grid):
    weight = trained(grid)
    with torch.no_grad():
        weight.start.fill_(2.0**-22)  # an 8-bit step of it is smaller than what fp16 holds
        weight.weight.copy_(torch.arange(-144, 144).view(6, 48) / 2)
    left = weight.fixed_point()
    assert torch.equal(left.rounded().dequantize(torch.float32), weight().detach())
    if grid.bits < 8:
        assert torch.equal(left.eight_bits().scale.half().float() * 2.0 ** (8 - grid.bits), left.scale)


@pytest.mark.parametrize("grid", GRIDS, ids=Grid.describe)
def test_gradients_are_those_of_the_plain_formula(grid: Grid):
    weight = trained(grid, scale_dtype="fp32")
    ways = torch.randn(6, 48)
    (weight() * ways).sum().backward()

    shift, zero_point = (None if p is None else p.detach().clone().requires_grad_()
                         for p in (weight.scale_shift, weight.zero_point))  # fmt: skip
    plain = weight.weight.detach().clone().requires_grad_()
    scale = weight.start * (1 + shift)
    zero = 0
    if zero_point is not None:
        integer = zero_point.detach().round().clamp(grid.qmin, grid.qmax)
        zero = (zero_point + (integer - zero_point).detach()).unsqueeze(-1)
    levels = grouped(plain, scale) * (weight.start / scale).unsqueeze(-1)
    steps = levels + (levels.round() - levels).detach() + zero
    built = scale.unsqueeze(-1) * (steps.clamp(grid.qmin, grid.qmax) - zero)
    assert torch.allclose(built.view_as(plain), weight(), atol=1e-6)
    (built.view_as(plain) * ways).sum().backward()
    for found, expected in ((weight.weight, plain), (weight.scale_shift, shift), (weight.zero_point, zero_point)):
        if expected is not None:
            assert torch.allclose(found.grad, expected.grad, rtol=1e-4, atol=1e-5)
            assert found.grad.any()


def test_a_scale_of_the_whole_tensor_sums_over_all_of_it():
    weight = trained(Grid(4, 0), scale_dtype="fp32")
    weight().sum().backward()
    assert weight.scale_shift.grad.shape == sum_per_scale(torch.ones(6, 48), weight.start).shape == (1, 1)
