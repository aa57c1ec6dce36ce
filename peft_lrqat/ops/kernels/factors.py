"""The factored second moment in one launch, where torch makes eight; the reference is `reference_step.update_factors`.

    r' = (b2 r + floor) + v (n n)       n the norms of rows, or of columns; v = (1 - b2) / their length

Norms and means stay torch's. Every operation is rounded on its own, as the reference's are.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .. import reference_step
from ..reference_step import norms_of_both
from .launch import Launch, launched
from .tiles import ceil_div

_BLOCK = 1024


@triton.jit
def _follow(means, norms, at, size, beta2, floor, v):
    """Update r at some places of rows, or of columns."""
    n = tl.load(norms + at, mask=at < size, other=0.0)
    r = tl.load(means + at, mask=at < size, other=0.0) * beta2 + floor
    tl.store(means + at, r + n * n * v, mask=at < size)


@launched
@triton.jit
def _factors_kernel(
    of_rows,
    of_columns,
    row_norms,
    column_norms,
    rows,
    columns,
    row_programs,
    beta2,
    floor,
    row_share,
    column_share,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if program < row_programs:
        _follow(of_rows, row_norms, program * BLOCK + tl.arange(0, BLOCK), rows, beta2, floor, row_share)
    else:
        at = (program - row_programs) * BLOCK + tl.arange(0, BLOCK)
        _follow(of_columns, column_norms, at, columns, beta2, floor, column_share)


@functools.lru_cache(maxsize=1024)
def _launch(rows: int, columns: int, beta2: float) -> Launch:
    row_programs = ceil_div(rows, _BLOCK)
    return _factors_kernel.launch(
        (row_programs + ceil_div(columns, _BLOCK),),
        rows,
        columns,
        row_programs,
        beta2,
        (1 - beta2) * 1e-30,
        # a row is as long as there are columns
        (1 - beta2) / columns,
        (1 - beta2) / rows,
        fused=False,
        BLOCK=_BLOCK,
    )


def update_factors(state: dict[str, torch.Tensor], grad: torch.Tensor, beta2: float) -> torch.Tensor:
    """Do what `reference_step.update_factors` does, bit for bit."""
    rows, columns = state["exp_avg_sq_rows"], state["exp_avg_sq_columns"]
    if not grad.numel() or not (rows.is_contiguous() and columns.is_contiguous()):
        return reference_step.update_factors(state, grad, beta2)
    norms = norms_of_both(grad)
    _launch(*grad.shape, float(beta2))(rows, columns, *norms)
    state["exp_avg_sq_mean"] = rows.mean()
    return norms[0]
