"""Latent weights behind packed codes: what they remember, and the ternary scales that follow them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_lrqat import LowBitAdamW
from peft_lrqat.grid import Grid, snap_scale
from peft_lrqat.ops.latent import PARTS, mean_magnitude, new_latent
from peft_lrqat.tuners.lowbit_sr import LowBitTensor

#: Each step moves a weight by the rate: the sign of the gradient times it.
SIGN = {"betas": (0.0, 0.0), "error_feedback": False}


def parameter(codes: torch.Tensor, grid: Grid, scale: float = 0.5) -> nn.Parameter:
    scales = torch.full(grid.scale_shape(*codes.shape), scale)
    return nn.Parameter(LowBitTensor.from_codes(codes.to(torch.int8), scales, grid, key=3))


def steps(p: nn.Parameter, optimizer: LowBitAdamW, grad: torch.Tensor | float, times: int) -> torch.Tensor:
    """int8 codes after so many steps with one gradient."""
    for _ in range(times):
        p.grad = torch.zeros(p.shape) + grad
        optimizer.step()
    return p.codes()


def latent(p: nn.Parameter, optimizer: LowBitAdamW) -> torch.Tensor:
    """x, fp32 (out, in), grid steps."""
    return p.codes().float() + optimizer.state[p]["latent_codes"].float() / PARTS


def test_latent_weights_start_anywhere_that_rounds_to_their_codes():
    p = parameter(torch.randint(-1, 2, (64, 300)), Grid(1.58, -1))
    before = p.codes()
    k = new_latent(p.packed, p.stream, 300).float()
    assert (k.min(), k.max()) == (-31, 31)
    assert abs(k.mean()) < 1
    assert abs(k.std() - 63 / 12**0.5) < 0.5
    assert torch.equal(p.codes(), before)
    assert int(p.stream[1]) == 1


def test_a_weight_beyond_the_last_level_takes_as_long_to_come_back():
    p = parameter(torch.ones(8, 64), Grid(1.58, -1))
    optimizer = LowBitAdamW([p], lr=1 / 32, lr_unit="grid", latent_weights=True, **SIGN)
    steps(p, optimizer, -1.0, 32)  # outwards, by a step: to somewhere between 1.5 and 2.5
    assert (steps(p, optimizer, 1.0, 31) == 1).all()
    assert (steps(p, optimizer, 1.0, 33) == 0).all()
    steps(p, optimizer, -1.0, 200)  # much further than it can go: to 1 + 127 / 64
    assert (latent(p, optimizer) == 1 + 127 / 64).all()
    assert (steps(p, optimizer, 1.0, 79) == 1).all()
    assert (steps(p, optimizer, 1.0, 2) == 0).all()


@pytest.mark.parametrize("state", ["8bit", "factored"])
def test_small_moves_add_up(state: str):
    """A thousandth of a step at a time, where the smallest that is kept is a 64th."""
    p = parameter(torch.zeros(64, 256), Grid(4, -1))
    optimizer = LowBitAdamW([p], lr=1e-3, lr_unit="grid", latent_weights=True, state=state)
    steps(p, optimizer, 1.0, 1)
    start = latent(p, optimizer)
    steps(p, optimizer, 1.0, 200)
    moved = latent(p, optimizer) - start
    assert float(moved.mean()) == pytest.approx(-0.2, abs=0.01)
    assert moved.std() < 0.06


def test_codes_do_not_tremble():
    """What is to stay between two levels keeps its code; stochastic rounding of the code visits both."""

    def changes(latent_weights: bool) -> float:
        torch.manual_seed(0)
        p = parameter(torch.zeros(32, 64), Grid(2, -1))
        optimizer = LowBitAdamW([p], lr=0.02, lr_unit="grid", latent_weights=latent_weights)
        changed = 0.0
        for _ in range(100):
            before = p.codes()
            changed += (steps(p, optimizer, torch.randn(32, 64), 1) != before).float().mean().item()
        return changed

    assert changes(True) < 0.5 * changes(False)


@pytest.mark.parametrize("group_size", [-1, 0, 32])
def test_ternary_scales_follow_the_mean_magnitude(group_size: int):
    grid = Grid(1.58, group_size)
    codes = torch.randint(-1, 2, (16, 64))
    p = parameter(codes, grid)
    optimizer = LowBitAdamW([p], lr=0.02, latent_weights=True, **SIGN)
    steps(p, optimizer, 0.0, 1)  # nothing moves
    assert torch.equal(p.scale, torch.full_like(p.scale, 0.5))
    assert torch.equal(p.codes(), codes.to(torch.int8))
    start = mean_magnitude(p.packed, optimizer.state[p]["latent_codes"], p.scale, grid, p.shape[1])
    expected = latent(p, optimizer).abs()
    expected = expected.mean() if group_size == 0 else expected.view(*start.shape, -1).mean(dim=-1)
    torch.testing.assert_close(start, expected.double().view(start.shape))
    steps(p, optimizer, -codes.float(), 20)  # all outwards, by nearly a step; then the scale looks back
    before = mean_magnitude(p.packed, optimizer.state[p]["latent_codes"], p.scale, grid, p.shape[1]) * p.scale
    steps(p, optimizer, 0.0, 1)
    assert (p.scale > 0.7).all()
    assert torch.equal(p.scale, snap_scale((before / start).float(), "auto"))
    # the weights are where they were, in whatever steps they count; codes still come from them
    after = mean_magnitude(p.packed, optimizer.state[p]["latent_codes"], p.scale, grid, p.shape[1]) * p.scale
    torch.testing.assert_close(after, before, rtol=0.02, atol=0)


def test_a_learning_rate_of_zero_changes_nothing_after_training_either():
    p = parameter(torch.randint(-1, 2, (16, 300)), Grid(1.58, -1))
    optimizer = LowBitAdamW([p], lr=0.02, latent_weights=True)
    for _ in range(10):
        steps(p, optimizer, torch.randn(p.shape), 1)
    optimizer.param_groups[0]["lr"] = 0.0
    codes, scale, x = p.codes(), p.scale.clone(), latent(p, optimizer)
    steps(p, optimizer, torch.randn(p.shape), 5)
    assert torch.equal(p.codes(), codes)
    assert torch.equal(p.scale, scale)
    assert torch.equal(latent(p, optimizer), x)


def test_weights_that_are_all_zero_can_leave():
    p = parameter(torch.zeros(4, 64), Grid(1.58, -1), scale=1e-6)
    optimizer = LowBitAdamW([p], lr=1e-3, latent_weights=True)
    steps(p, optimizer, torch.ones(64).index_fill(0, torch.arange(32), -1.0), 40)
    assert p.scale.isfinite().all()
    assert 0.005 < p.to_float().abs().mean() < 0.1
    assert (p.codes() == 0).float().mean() < 0.5


@pytest.mark.parametrize("group_size", [-1, 0, 64])
def test_a_weight_that_is_nearly_all_zero_stays_what_it_is(group_size: int):
    """A pruned row, or one with outliers: however few its codes, they are what was trained."""
    codes = torch.zeros(4, 512)
    codes[0, 7], codes[1, :20], codes[2, ::11], codes[3, -1] = 1, -1, 1, 1
    p = parameter(codes, Grid(1.58, group_size))
    before = p.to_float()
    steps(p, LowBitAdamW([p], lr=1e-9, latent_weights=True), torch.randn(p.shape), 3)
    groups = (-1, 64) if group_size == 64 else (-1, 512)
    known = before.view(groups).any(dim=1)  # scales of zeros alone have nothing to stay
    assert torch.equal(p.to_float().view(groups)[known], before.view(groups)[known])


def test_scales_follow_from_when_the_rate_counts_weights():
    p = parameter(torch.randint(-1, 2, (16, 64)), Grid(1.58, -1))
    optimizer = LowBitAdamW([p], lr=0.01, lr_unit="grid", latent_weights=True, **SIGN)
    steps(p, optimizer, 1.0, 3)
    optimizer.param_groups[0]["lr_unit"] = "weight"
    steps(p, optimizer, 0.0, 2)
    assert torch.equal(p.scale, torch.full_like(p.scale, 0.5))
    outwards = -p.codes().float()
    steps(p, optimizer, outwards, 20)
    assert (p.scale > 0.55).all()


def test_a_gradient_that_is_not_finite_poisons_the_scale():
    p = parameter(torch.ones(4, 64), Grid(1.58, -1))
    optimizer = LowBitAdamW([p], latent_weights=True)
    steps(p, optimizer, float("nan"), 1)
    assert p.scale.isnan().all()
