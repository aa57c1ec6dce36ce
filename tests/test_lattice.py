from __future__ import annotations

import pytest
import torch

from peft_lrqat import chunks
from peft_lrqat.grid import Grid, dequantize, quantize, snap_scale
from peft_lrqat.ranges import RANGE_METHODS, choose_range


def lattice(grid: Grid, scale_dtype: str, rows: int = 48, columns: int = 192) -> tuple[torch.Tensor, ...]:
    """Random codes with both ends of the grid in every group, scales of both signs, and zero points."""
    shape = grid.scale_shape(rows, columns)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (rows, columns), dtype=torch.int8)
    ends = codes.view(rows, shape[1], -1)
    ends[..., 0], ends[..., 1] = grid.qmin, grid.qmax
    scale = snap_scale(torch.rand(shape) * 0.02 + 1e-3, scale_dtype)
    if grid.symmetric:
        scale = torch.where(torch.rand(shape) < 0.5, -scale, scale)
    zero = None if grid.symmetric else torch.randint(-6, 7, shape, dtype=torch.int8)
    return codes, scale, zero


@pytest.mark.parametrize(
    ("dtype", "scale_dtype"),
    [(torch.bfloat16, kept) for kept in ("auto", "fp16", "fp32")]
    + [(torch.float16, "fp16"), (torch.float32, "auto"), (torch.float32, "fp16")],
)
@pytest.mark.parametrize("method", RANGE_METHODS)
def test_a_weight_that_was_rounded_to_its_dtype_is_given_back(method: str, dtype: torch.dtype, scale_dtype: str):
    """Google's Gemma in bf16 on the lattice of Q4_0: d is an fp16 number, codes from -8 to 7."""
    for grid in (Grid(4, 32), Grid(4, -1), Grid(3, 0), Grid(4, 32, False)):
        codes, scale, zero = lattice(grid, scale_dtype)
        weight = dequantize(codes, scale, zero, dtype)
        found, found_zero = choose_range(weight, grid, method, scale_dtype=scale_dtype, signed=grid.symmetric)
        again = dequantize(quantize(weight, found, found_zero, grid), found, found_zero, dtype)
        assert torch.equal(again, weight), grid.describe()


def test_without_it_groups_of_bf16_weights_were_missed(monkeypatch: pytest.MonkeyPatch):
    grid = Grid(4, 32)
    codes, scale, _ = lattice(grid, "fp16")
    weight = dequantize(codes, scale, None, torch.bfloat16)
    found, _ = choose_range(weight, grid, scale_dtype="fp16", signed=True)
    assert torch.equal(quantize(weight, found, None, grid), codes)
    assert (found == scale).float().mean() > 0.2  # in the others, several scales give the same numbers in bf16
    assert ((found - scale).abs() <= scale.abs() * 2.0**-8).all()
    monkeypatch.setattr("peft_lrqat.ranges.recover_scale", lambda parts, scale, *others: scale)
    missed, _ = choose_range(weight, grid, scale_dtype="fp16", signed=True)
    assert (missed != found).float().mean() > 0.5


@pytest.mark.parametrize("columns", [8, 96])
def test_weights_on_no_grid_keep_the_best_scale(columns: int, monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(64, columns).bfloat16()
    with monkeypatch.context() as patch:
        patch.setattr("peft_lrqat.ranges.recover_scale", lambda parts, scale, *others: scale)
        expected, _ = choose_range(weight, Grid(4, -1), signed=True)
    assert torch.equal(choose_range(weight, Grid(4, -1), signed=True)[0], expected)


def test_numbers_of_bf16_in_fp32_are_recognized_line_by_line(monkeypatch: pytest.MonkeyPatch):
    grid = Grid(4, 32)
    codes, scale, _ = lattice(grid, "fp16")
    weight = dequantize(codes, scale, None, torch.bfloat16).float()
    weight[::2] *= 1 + 1e-5
    low, _ = choose_range(weight[1::2].bfloat16(), grid, scale_dtype="fp16", signed=True)
    whole, _ = choose_range(weight, grid, scale_dtype="fp16", signed=True)
    assert torch.equal(whole[1::2], low)
    monkeypatch.setattr(chunks, "CPU_CHUNK", 192 * 5)
    assert torch.equal(choose_range(weight, grid, scale_dtype="fp16", signed=True)[0], whole)
