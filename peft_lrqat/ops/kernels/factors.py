"""The factored second moment in one launch, where torch makes six; the reference is `reference_step.update_factors`.

    r' = (b2 r + floor) + v n n        n the norms of rows, or of columns; v = (1 - b2) / their length

Norms and means stay torch's. The last sum and products are its `addcmul`, whose roundings differ from device to device
and between its versions: one of the orders below, which is found out once, by comparing. Where none is torch's, torch
does it.
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
#: How `addcmul` may round: names of what `_follow` does.
ORDERS = ("fma(v, n n, r)", "fma(v n, n, r)", "r + v (n n)", "r + (v n) n")


@triton.jit
def _follow(after, before, norms, at, size, beta2, floor, v, ORDER: tl.constexpr):
    """Store r' at some places of rows, or of columns."""
    n = tl.load(norms + at, mask=at < size, other=0.0)
    r = tl.load(before + at, mask=at < size, other=0.0) * beta2 + floor
    if ORDER == 0:
        r = tl.fma(v + tl.zeros_like(n), n * n, r)
    elif ORDER == 1:
        r = tl.fma(v * n, n, r)
    elif ORDER == 2:
        r = r + v * (n * n)
    else:
        r = r + (v * n) * n
    tl.store(after + at, r, mask=at < size)


@launched
@triton.jit
def _factors_kernel(
    rows_after,
    columns_after,
    rows_before,
    columns_before,
    row_norms,
    column_norms,
    rows,
    columns,
    row_programs,
    beta2,
    floor,
    of_rows,
    of_columns,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if program < row_programs:
        at = program * BLOCK + tl.arange(0, BLOCK)
        _follow(rows_after, rows_before, row_norms, at, rows, beta2, floor, of_rows, ORDER)
    else:
        at = (program - row_programs) * BLOCK + tl.arange(0, BLOCK)
        _follow(columns_after, columns_before, column_norms, at, columns, beta2, floor, of_columns, ORDER)


@functools.lru_cache(maxsize=1024)
def _launch(rows: int, columns: int, beta2: float, order: int) -> Launch:
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
        ORDER=order,
        BLOCK=_BLOCK,
    )


@functools.cache
def torchs_order(device: torch.device) -> int | None:
    """Find which of `ORDERS` is that of torch's `addcmul` on a device; None: another one. Waits for the device."""
    size = 4096
    # numbers with all their bits, and sums of two that are about as large
    before, norms = (torch.arange(1, 2 * size + 1, device=device) * 0.7311 % 1).view(2, size).unbind()
    before, beta2 = before / size, 0.02
    expected = (before * beta2).add_((1 - beta2) * 1e-30).addcmul_(norms, norms, value=(1 - beta2) / size)
    for order in range(len(ORDERS)):
        after = torch.empty(2, size, device=device)
        _launch(size, size, beta2, order)(*after.unbind(), before, before, norms, norms)
        if torch.equal(after, torch.stack([expected, expected])):
            return order
    return None


def update_factors(state: dict[str, torch.Tensor], grad: torch.Tensor, beta2: float) -> torch.Tensor:
    """Do what `reference_step.update_factors` does, bit for bit."""
    order = torchs_order(grad.device)
    if order is None or not grad.numel():
        return reference_step.update_factors(state, grad, beta2)
    rows, columns = (state[f"exp_avg_sq_{what}"].contiguous() for what in ("rows", "columns"))
    norms = norms_of_both(grad)
    after = torch.empty_like(rows), torch.empty_like(columns)
    _launch(*grad.shape, beta2, order)(*after, rows, columns, *norms)
    state["exp_avg_sq_rows"], state["exp_avg_sq_columns"] = after
    state["exp_avg_sq_mean"] = after[0].mean()
    return norms[0]
