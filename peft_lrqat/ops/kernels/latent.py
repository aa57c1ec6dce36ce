"""Ternary scales that follow their latent weights, in one pass over codes and latent weights; the reference is
`ops/latent.py`.

A program adds up |64 q + k| over BM rows of one group. Where a row has scales of its own, the sums are complete, and
the program goes on to the new scales. Where all rows share them, it leaves one number, and a second launch adds these
up. Sums are of integers, which fp32 holds (it adds up every thousandth of a row), and so they are the reference's; what
follows is in fp64, operation for operation.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ...grid import Grid, sum_per_scale
from ..latent import PARTS
from .launch import Launch, launched
from .prepare import snap
from .tiles import ceil_div, load, power_of_2, scale_stride, stored_levels

#: Weights that a program works on at a time, how many of one row at most, and sums that one adds up at a time.
_TILE, _COLUMNS, _SUMS = 4096, 1024, 1024


@triton.jit
def _follow(total, scale, scale_before, start, lr, at, ok, parts):
    """Store s', as `latent.follow_magnitude` computes it, and s.

    Args:
        total: int64, sums of |64 q + k|.
        at: the places of these scales.
        parts: 64 times the number of weights that share a scale.
    """
    s = tl.load(scale + at, mask=ok, other=1.0)
    c = tl.load(start + at, mask=ok, other=1.0).to(tl.float64)
    mean = total.to(tl.float64) * (1.0 / parts.to(tl.float64))
    followed = (s.to(tl.float64) * mean / c).to(tl.float32)
    kept = snap(tl.abs(followed), 0)
    kept = tl.where(followed < 0, -kept, kept)
    kept = tl.where(tl.load(lr) > 0, kept, s)
    tl.debug_barrier()  # threads may hold copies of what others write
    tl.store(scale_before + at, s, mask=ok)
    tl.store(scale + at, kept, mask=ok)


@launched
@triton.jit
def _sums_kernel(
    packed, latent, sums, scale, scale_before, start, lr, scale_stride, rows, columns, words, group_size, parts,
    BITS: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Store the new scales; or, where there is `sums`, those: one a row, or a program where all rows share."""
    group = tl.program_id(0)
    j = tl.program_id(1) * BM + tl.arange(0, BM)
    row_ok = j < rows
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for within in range(0, group_size, BN):
        first = group * group_size + within
        i = first + tl.arange(0, BN)
        column_ok = within + tl.arange(0, BN) < group_size
        x = stored_levels(packed, j, i, first, row_ok, column_ok, words, BITS, "int", FULL) * PARTS
        ok = row_ok[:, None] & column_ok[None, :]
        if latent is not None:
            x += load(latent + j.to(tl.int64)[:, None] * columns + i[None, :], ok, FULL).to(tl.float32)
        total += tl.abs(x) if FULL else tl.where(ok, tl.abs(x), 0.0)
    total = tl.sum(total.to(tl.int32), 1).to(tl.int64)
    if sums is None:
        _follow(total, scale, scale_before, start, lr, j * scale_stride + group, row_ok, parts)
    elif scale_stride == 0:
        tl.store(sums + tl.program_id(1) * tl.num_programs(0) + group, tl.sum(total, 0))
    else:
        tl.store(sums + j * tl.num_programs(0) + group, total, mask=row_ok)


@launched
@triton.jit
def _follow_kernel(sums, scale, scale_before, start, lr, count, parts, BLOCK: tl.constexpr):
    """Store the new scales from `count` sums of each."""
    group = tl.program_id(0) + tl.arange(0, 1)
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    for n in range(0, count, BLOCK):
        number = n + tl.arange(0, BLOCK)
        total += tl.load(sums + number * tl.num_programs(0) + group, mask=number < count, other=0)
    _follow(tl.sum(total, 0) + tl.zeros_like(group), scale, scale_before, start, lr, group, group >= 0, parts)


@functools.lru_cache(maxsize=1024)
def _sums_launch(rows: int, columns: int, words: int, scales: tuple[int, int], bits: int) -> Launch:
    group = columns // scales[1]
    BN = next((n for n in (_COLUMNS, 512, 256, 128, 64, 32) if group % n == 0), 0)
    BN = BN or max(16, min(_COLUMNS, power_of_2(group)))
    BM = min(_TILE // BN, power_of_2(rows))
    return _sums_kernel.launch(
        (scales[1], ceil_div(rows, BM)),
        scale_stride(scales),
        rows,
        columns,
        words,
        group,
        _parts(rows, columns, scales[0] * scales[1]),
        BITS=bits,
        PARTS=PARTS,
        BM=BM,
        BN=BN,
        FULL=rows % BM == 0 and group % BN == 0,
    )


@functools.lru_cache(maxsize=1024)
def _follow_launch(count: int, groups: int, parts: int) -> Launch:
    return _follow_kernel.launch((groups,), count, parts, BLOCK=min(_SUMS, power_of_2(count)))


def _parts(rows: int, columns: int, scales: int) -> int:
    """64 times the number of weights that share a scale."""
    return PARTS * (rows * columns // scales)


def mean_magnitude(
    packed: torch.Tensor, latent: torch.Tensor | None, scale: torch.Tensor, grid: Grid, columns: int
) -> torch.Tensor:
    """Compute what `latent.mean_magnitude` does, bit for bit."""
    rows = packed.shape[0]
    launch = _sums_launch(rows, columns, packed.shape[1], tuple(scale.shape), grid.code_bits)
    groups, programs = launch.grid
    sums = packed.new_empty(programs if scale.shape[0] == 1 else rows, groups, dtype=torch.int64)
    launch(packed.contiguous(), None if latent is None else latent.contiguous(), sums, *(None,) * 4)
    return sum_per_scale(sums, scale).double() * (1 / _parts(rows, columns, scale.numel()))


def follow_magnitude(
    packed: torch.Tensor, latent: torch.Tensor, scale: torch.Tensor, start: torch.Tensor, lr: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Do what `latent.follow_magnitude` does, bit for bit; never waits for the device.

    `scale` must be contiguous, and `lr` must lie on the device.
    """
    rows, columns = latent.shape
    launch = _sums_launch(rows, columns, packed.shape[1], tuple(scale.shape), grid.code_bits)
    groups, programs = launch.grid
    before, start = torch.empty_like(scale), start.contiguous()
    sums = packed.new_empty(programs, groups, dtype=torch.int64) if scale.shape[0] == 1 else None
    launch(packed.contiguous(), latent.contiguous(), sums, scale, before, start, lr)
    if sums is not None:
        _follow_launch(programs, groups, _parts(rows, columns, scale.numel()))(sums, scale, before, start, lr)
    return before
