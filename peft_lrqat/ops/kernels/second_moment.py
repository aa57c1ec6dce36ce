"""The factored second moment in one pass over the gradient and two launches; the reference is
`reference_step.update_factors`.

    r' = (b2 r + floor) + v (n n)       n the norms of rows, or of columns; v = (1 - b2) / their length

A program of the first launch squares a tile, and leaves the sums of its rows and of its columns. The second adds up
those of a row, or of a column, always in the same order, so that a run can be repeated. The order is not torch's: norms
differ from the reference's by rounding. What is made of them does not: every operation is rounded on its own.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import reference_step
from .launch import Launch, launched
from .tiles import ceil_div

#: Rows and columns of a tile, rows that a program has at a time; rows or columns, and sums of each, that the second
#: launch has at a time.
_TILE_ROWS, _TILE_COLUMNS, _AT_A_TIME, _BLOCK, _PARTS = 64, 256, 16, 64, 64


@launched
@triton.jit
def _squares_kernel(
    grad,
    row_parts,
    column_parts,
    rows,
    columns,
    column_tiles,
    BM: tl.constexpr,
    BN: tl.constexpr,
    AT_A_TIME: tl.constexpr,
):
    m, n = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    i = n * BN + tl.arange(0, BN)
    of_columns = tl.zeros((AT_A_TIME, BN), dtype=tl.float32)
    for start in range(0, BM, AT_A_TIME):
        j = m.to(tl.int64) * BM + start + tl.arange(0, AT_A_TIME)
        ok = (j < rows)[:, None] & (i < columns)[None, :]
        g = tl.load(grad + j[:, None] * columns + i[None, :], mask=ok, other=0).to(tl.float32)
        square = g * g
        of_columns += square
        tl.store(row_parts + n.to(tl.int64) * rows + j, tl.sum(square, 1), mask=j < rows)
    tl.store(column_parts + m.to(tl.int64) * columns + i, tl.sum(of_columns, 0), mask=i < columns)


@triton.jit
def _follow(means, norms, parts, count, at, size, beta2, floor, v, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Add up the squares of some rows, or columns, and update their r; where `norms` is not None, store norms."""
    ok = at < size
    sums = tl.zeros((PARTS, BLOCK), dtype=tl.float32)
    for start in range(0, count, PARTS):
        part = (start + tl.arange(0, PARTS)).to(tl.int64)[:, None]
        sums += tl.load(parts + part * size + at[None, :], mask=(part < count) & ok[None, :], other=0.0)
    n = tl.sqrt_rn(tl.sum(sums, 0))
    if norms is not None:
        tl.store(norms + at, n, mask=ok)
    r = tl.load(means + at, mask=ok, other=0.0) * beta2 + floor
    tl.store(means + at, r + n * n * v, mask=ok)


@launched
@triton.jit
def _factors_kernel(
    of_rows,
    of_columns,
    row_norms,
    row_parts,
    column_parts,
    rows,
    columns,
    row_tiles,
    column_tiles,
    row_programs,
    beta2,
    floor,
    row_share,
    column_share,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    program = tl.program_id(0)
    if program < row_programs:
        at = program * BLOCK + tl.arange(0, BLOCK)
        _follow(of_rows, row_norms, row_parts, column_tiles, at, rows, beta2, floor, row_share, BLOCK, PARTS)
    else:
        at = (program - row_programs) * BLOCK + tl.arange(0, BLOCK)
        _follow(of_columns, None, column_parts, row_tiles, at, columns, beta2, floor, column_share, BLOCK, PARTS)


class _Launches(NamedTuple):
    squares: Launch
    factors: Launch
    row_tiles: int
    column_tiles: int


@functools.lru_cache(maxsize=1024)
def _launches(rows: int, columns: int, beta2: float) -> _Launches:
    row_tiles, column_tiles = ceil_div(rows, _TILE_ROWS), ceil_div(columns, _TILE_COLUMNS)
    row_programs = ceil_div(rows, _BLOCK)
    squares = _squares_kernel.launch(
        (row_tiles * column_tiles,),
        rows,
        columns,
        column_tiles,
        BM=_TILE_ROWS,
        BN=_TILE_COLUMNS,
        AT_A_TIME=_AT_A_TIME,
    )
    factors = _factors_kernel.launch(
        (row_programs + ceil_div(columns, _BLOCK),),
        rows,
        columns,
        row_tiles,
        column_tiles,
        row_programs,
        beta2,
        (1 - beta2) * 1e-30,
        # a row is as long as there are columns
        (1 - beta2) / columns,
        (1 - beta2) / rows,
        fused=False,
        BLOCK=_BLOCK,
        PARTS=_PARTS,
    )
    return _Launches(squares, factors, row_tiles, column_tiles)


def update_factors(state: dict[str, torch.Tensor], grad: torch.Tensor, beta2: float) -> torch.Tensor:
    """Do what `reference_step.update_factors` does, with norms that are summed in another order."""
    of_rows, of_columns = state["exp_avg_sq_rows"], state["exp_avg_sq_columns"]
    if not grad.numel() or not (of_rows.is_contiguous() and of_columns.is_contiguous()):
        return reference_step.update_factors(state, grad, beta2)
    rows, columns = grad.shape
    launches = _launches(rows, columns, float(beta2))
    row_parts, column_parts = (
        torch.empty(count, dtype=torch.float32, device=grad.device)
        for count in (launches.column_tiles * rows, launches.row_tiles * columns)
    )
    norms = torch.empty_like(of_rows)
    launches.squares(grad.contiguous(), row_parts, column_parts)
    launches.factors(of_rows, of_columns, norms, row_parts, column_parts)
    state["exp_avg_sq_mean"] = of_rows.mean()
    return norms
