"""The backward of `quantized_linear` on a GPU; formulas in `tuners/lrqat/layer.py`, reference in `ops/reference.py`.

Products are the vendor library's, in the compute dtype, and kernels do what is between them. Nothing is read by the
host. Two ways:

*By rows*, where one scale, or one shift of all its scales, serves a row and few entries are clipped (4 bits and more):
A and B cost what they cost in LoRA, and G = dY^T X is formed only in tiles that hold a clipped entry, to take that
entry's share out again (`_clipped_kernel`; tiles without one return at once). The shares are added atomically, in no
fixed order.

*By G*, everywhere else and under `torch.use_deterministic_algorithms(True)`: G by one product; a kernel turns it into
dZ = M s G in place and sums G Q over each scale; then two thin products for A and B.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...grid import sum_per_scale
from ..reference import Gradients, by_channel, shift_gradient_by_row
from ..stored_base import BaseFormat
from .launch import Launch, launched
from .prepare import Offsets, Prepared, prepare
from .tiles import (
    INTERPRETED,
    a_tile,
    adapter_step,
    b_tile,
    ceil_div,
    clip,
    first_a,
    load,
    power_of_2,
    rounded_levels,
    store,
    tile_columns,
    tile_rows,
    tiling,
    tokens_of,
)
from .weight import prepared_weight

#: Grids coarser than this hold so many weights at their ends that nearly every tile has a clipped entry.
_BY_ROWS_FROM_BITS = 4


def keeps_output(scale0: torch.Tensor, shift: torch.Tensor | None, bits: int) -> bool:
    """Tell whether the backward goes by rows, and then wants Y for the scales."""
    required = (
        torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    )
    return (scale0.shape[1] == 1 or by_channel(scale0, shift)) and bits >= _BY_ROWS_FROM_BITS and not required


def linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor | None,
    base: torch.Tensor,
    scale0: torch.Tensor,
    shift: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    c: float,
    fmt: BaseFormat,
    scale_dtype: str,
    need_x: bool,
    need_shift: bool,
    need_AB: bool,
) -> Gradients:
    """Compute what `reference.linear_backward` does, up to the order of the sums."""
    rows, groups = base.shape[0], scale0.shape[1]
    if A is None or B is None:
        need_AB = False
    elif need_AB and not A.shape[0]:  # rank 0: gradients without entries
        weight_side = (base, scale0, shift, zero_point, A, B)
        grads = linear_backward(dy, x, y, *weight_side, c, fmt, scale_dtype, need_x, need_shift, False)
        return grads._replace(A=torch.zeros_like(A, dtype=torch.float32), B=torch.zeros_like(B, dtype=torch.float32))
    by_rows = keeps_output(scale0, shift, fmt.bits) and (y is not None or not need_shift)
    dy, x, base = dy.contiguous(), x.contiguous(), base.contiguous()
    low = dy.dtype if need_AB else None
    prepared = prepare(scale0, shift, scale_dtype, A, B, c, rows, low, by_rows)
    dshift = dA = dB = flags = None
    if by_rows and need_AB:
        tiles = tiling(rows, fmt.in_features, groups)
        flags = torch.empty(tiles.total, dtype=torch.int32, device=base.device)
    elif not by_rows and (need_shift or need_AB):
        dshift, dA, dB = _by_G(dy, x, base, scale0, zero_point, prepared, c, fmt, need_shift, need_AB)
    dx = None
    if need_x or flags is not None:
        weight = prepared_weight(base, groups, zero_point, prepared, fmt, dy.dtype, flags)
        dx = torch.mm(dy, weight) if need_x else None
        del weight
    if by_rows and (need_shift or need_AB):
        xA = None
        if flags is not None:
            assert prepared.a_low is not None
            assert prepared.b_low is not None
            xA, dA = torch.mm(x, prepared.a_low.t()), _mm_fp32(torch.mm(dy, prepared.b_low).t(), x)
        dshift, dB = row_gradients(dy, x, y if need_shift else None, base, scale0, prepared, c, fmt, flags, xA, dA)
    return Gradients(dx, dshift, dA, dB)


def _mm_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply two matrices of one dtype to fp32, without rounding to that dtype on the way."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


# -- by rows

_CLIPPED_PROGRAMS = 528  # four for each multiprocessor of an H100: where nothing is clipped, a program costs its start


class _RowLaunches(NamedTuple):
    sums: Launch
    clipped: Launch


@functools.lru_cache(maxsize=4096)
def _row_launches(
    tokens: int,
    rows: int,
    words: int,
    groups: int,
    fmt: BaseFormat,
    offsets: Offsets,
    rank: int,
    c: float,
    wide: bool,
    stack: int,
) -> _RowLaunches:
    """Fix both launches.

    Args:
        rows: of one expert.
        wide: whether the compute dtype is fp32, whose tiles take twice the space.
    """
    padded = max(16, power_of_2(rank))
    BR = min(padded, 64)
    sums = _row_sums_kernel.launch(
        (ceil_div(rows, 64) * stack, padded // BR),
        float(c),
        *_steps_at(offsets, rows * stack),
        tokens,
        rows,
        RANK=rank,
        BT=32 if wide else 64,
        BC=64,
        BR=BR,
        STAGES=5 if BR <= 32 else 4,  # which fit into the 99 KiB that the smallest GPUs share
    )
    tiles = tiling(rows, fmt.in_features, groups, stack=stack)
    programs = min(tiles.total, _CLIPPED_PROGRAMS)
    clipped = _clipped_kernel.launch(
        (programs,),
        float(c),
        *offsets,
        words,
        tokens,
        fmt.in_features,
        rows,
        stack,
        fused=not offsets.by_channel,
        **tiles.constants(fmt, rank, offsets.by_channel),
        BT=32,
        FLAGS=power_of_2(ceil_div(tiles.total, programs)),
    )
    return _RowLaunches(sums, clipped)


def _steps_at(offsets: Offsets, rows: int) -> tuple[int, int, int]:
    """Tell where `_row_sums_kernel` finds the steps of rows (`Prepared.row_steps`): of s0 and s the first entries, by
    channel t and u in the buffer; and how many entries there are from row to row."""
    return (offsets.step + rows, offsets.step, 1) if offsets.by_channel else (0, 0, offsets.scale_stride)


def row_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor | None,
    base: torch.Tensor,
    scale0: torch.Tensor,
    prepared: Prepared,
    c: float,
    fmt: BaseFormat,
    flags: torch.Tensor | None,
    xA: torch.Tensor | None,
    dA: torch.Tensor | None,
    bounds: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Compute the gradients of the shift (where y is given) and of B (where flags are), fp32, and take out of that of A
    what clipped entries put there.

    Args:
        flags: int32 (tiles,), 1 for each tile with a clipped entry; None: no gradient of A and B is wanted.
        xA: X A~^T (tokens, R), in x's dtype, where flags are.
        dA: (s B~)^T dY^T X, fp32 (R, in), where flags are (by channel: with the row's largest s). Changed.
        bounds: see `prepared_weight`. Of a stack, what has `out` rows has those of all experts, except dy and y; and so
            has what has R.
    """
    rows, device, stack = base.shape[0], dy.device, 1 if bounds is None else bounds.shape[0] - 1
    dshift = dB = None
    if y is not None:
        y, dshift = y.contiguous(), torch.empty(rows, 1, dtype=torch.float32, device=device)
    if flags is not None:
        dB = torch.empty(rows, prepared.rank, dtype=torch.float32, device=device)
    rank = 0 if flags is None else prepared.rank
    constants = (base.shape[1], scale0.shape[1], fmt, prepared.offsets, rank, c, dy.dtype == torch.float32, stack)
    tokens = dy.shape[0] if bounds is None else 0  # where `bounds` say it, launches are the same for any number
    launches = _row_launches(tokens, dy.shape[1], *constants)
    channels = prepared.offsets.by_channel
    launches.sums(dB, dshift, dy, y, xA, prepared.scale if channels else scale0, prepared.scale, bounds)
    if flags is not None:
        launches.clipped(dA, dB, dy, x, flags, base, prepared.scale, prepared.buffer, bounds)
    return dshift if dshift is None or channels else sum_per_scale(dshift, scale0), dB


@launched
@triton.jit
def _row_sums_kernel(
    dB, dshift, dy, y, xA, scale0, scale, bounds, c, at0, at1, scale_stride, tokens, rows, RANK: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dB = c s dY^T (X A~^T), and dshift = s0 ds with ds = (sum_t dY Y) / s, since sum_t dY Y = s sum_i G Q.
    By channel, s0 and s are the row's largest. They begin at `at0` and `at1`.

    A program owns BC rows of W and BR columns of dB, so the order of the sums does not vary.
    """
    j, row_ok, expert = tile_rows(tl.program_id(0), rows, bounds, BC)
    begin, end = tokens_of(expert, tokens, bounds)
    column = j - expert * rows  # of dY and Y
    k = tl.program_id(1) * BR + tl.arange(0, BR)
    k_ok = k < RANK
    first = row_ok & (j * 0 + tl.program_id(1) == 0)  # one of the programs of these rows sums for the scales
    total = tl.zeros((BT, BC), dtype=tl.float32)
    product = tl.zeros((BC, BR), dtype=tl.float32)
    for start in tl.range(begin, end, BT, num_stages=STAGES):
        t = start + tl.arange(0, BT)
        at = t.to(tl.int64)[:, None] * rows + column[None, :]
        t_ok = (t < end)[:, None]
        d = tl.load(dy + at, mask=t_ok & row_ok[None, :], other=0.0)
        if y is not None:
            total += d.to(tl.float32) * tl.load(y + at, mask=t_ok & first[None, :], other=0.0).to(tl.float32)
        if xA is not None:
            v = tl.load(xA + t[:, None] * RANK + k[None, :], mask=t_ok & k_ok[None, :], other=0.0)
            if INTERPRETED:
                d, v = d.to(tl.float32), v.to(tl.float32)
            product = tl.dot(tl.trans(d), v, product, input_precision="tf32x3")
    s = tl.load(scale + at1 + j * scale_stride, mask=row_ok, other=1.0)
    if y is not None:
        s0 = tl.load(scale0 + at0 + j * scale_stride, mask=row_ok, other=1.0)
        tl.store(dshift + j, tl.sum(total, 0) / s * s0, mask=first)
    if xA is not None:
        inside = row_ok[:, None] & k_ok[None, :]
        tl.store(dB + j[:, None] * RANK + k[None, :], product * (s * c)[:, None], mask=inside)


@launched
@triton.jit
def _clipped_kernel(
    dA,
    dB,
    dy,
    x,
    flags,
    base,
    scale,
    factors,
    bounds,
    c,
    scale_stride,
    units,
    step,
    a_step,
    b_step,
    a_int,
    b_int,
    words,
    tokens,
    in_features,
    out_features,
    stack,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    BITS: tl.constexpr,
    DOWNCAST: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FULL: tl.constexpr,
    BT: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Take out of dA and dB what clipped entries put there: dZ is 0 where round(Z) lies outside of the grid.

    A program has up to FLAGS tiles, and first looks at the flags of all: one by one, each would be waited for.
    """
    columns = in_features // GROUP * ((GROUP + BN - 1) // BN)
    tiles = columns * tl.cdiv(out_features, BM) * stack
    own = tl.program_id(0) + tl.arange(0, FLAGS) * tl.num_programs(0)
    if tl.max(tl.load(flags + own, mask=own < tiles, other=0), 0) == 0:
        return
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        if tl.load(flags + tile) != 0:
            n, m = tile % columns, tile // columns
            j, row_ok, expert = tile_rows(m, out_features, bounds, BM)
            begin, end = tokens_of(expert, tokens, bounds)
            column = j - expert * out_features  # of dY
            i, column_ok, group, first = tile_columns(n, GROUP, BN)
            G = tl.zeros((BM, BN), dtype=tl.float32)
            for start in range(begin, end, BT):
                t = start + tl.arange(0, BT)
                row = t.to(tl.int64)[:, None]
                t_ok = (t < end)[:, None]
                d = tl.load(dy + row * out_features + column[None, :], mask=t_ok & row_ok[None, :], other=0.0)
                v = tl.load(x + row * in_features + i[None, :], mask=t_ok & column_ok[None, :], other=0.0)
                if INTERPRETED:
                    d, v = d.to(tl.float32), v.to(tl.float32)
                G = tl.dot(tl.trans(d), v, G, input_precision="tf32x3")
            a, a_steps = first_a(factors, a_int, a_step, expert, i, column_ok, in_features, RANK, FULL)
            z = rounded_levels(
                base, factors, scale_stride, units, b_step, a_int, b_int, a, a_steps, expert, j, i, group, first,
                row_ok, column_ok, words, in_features, RANK, BITS, DOWNCAST, BY_CHANNEL, FULL,
            )  # fmt: skip
            clipped = (clip(z, BITS) != z) & row_ok[:, None] & column_ok[None, :]
            s = adapter_step(scale, factors, scale_stride, step, j, group, row_ok, BY_CHANNEL, FULL)
            dZ = tl.where(clipped, G * s[:, None], 0.0)
            of_b = load(factors + b_step + j, row_ok, FULL)
            BR: tl.constexpr = 16 if RANK <= 16 else 32
            for first_k in tl.static_range(0, RANK, BR):
                k = first_k + tl.arange(0, BR)
                k_ok = k < RANK
                a = a_tile(factors, a_int, expert * RANK + k, i, k_ok, column_ok, in_features, False)
                a = a.to(tl.float32) * a_steps[None, :]
                share = tl.dot(dZ, tl.trans(a), input_precision="tf32x3")  # (BM, BR)
                tl.atomic_add(dB + j[:, None] * RANK + k[None, :], -c * share, mask=row_ok[:, None] & k_ok[None, :])
                b = b_tile(factors, b_int, j, k, row_ok, k_ok, RANK, False).to(tl.float32) * of_b[:, None]
                share = tl.dot(tl.trans(b), dZ, input_precision="tf32x3")  # (BR, BN)
                at = dA + (expert * RANK + k)[:, None] * in_features + i[None, :]
                tl.atomic_add(at, -share, mask=k_ok[:, None] & column_ok[None, :])


# -- by G


@functools.lru_cache(maxsize=4096)
def _launch_by_G(
    rows: int, words: int, groups: int, fmt: BaseFormat, offsets: Offsets, rank: int, write: bool, stack: int
) -> tuple[Launch, int]:
    """Fix the launch; also returns how many sums a row gets."""
    tiles = tiling(rows, fmt.in_features, groups, BM=16, loops=False, stack=stack)
    launch = _by_G_kernel.launch(
        tiles.grid,
        *offsets,
        words,
        fmt.in_features,
        rows,
        fused=not offsets.by_channel,
        **tiles.constants(fmt, rank, offsets.by_channel),
        WRITE=write,
    )
    return launch, tiles.columns


def _by_G(
    dy: torch.Tensor,
    x: torch.Tensor,
    base: torch.Tensor,
    scale0: torch.Tensor,
    zero_point: torch.Tensor | None,
    prepared: Prepared,
    c: float,
    fmt: BaseFormat,
    need_shift: bool,
    need_AB: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Compute the gradients of the shift, A and B, all fp32 and None where not needed, through G."""
    G = torch.mm(dy.t(), x)
    dshift = project(G, base, scale0, zero_point, prepared, fmt, need_shift, need_AB)
    dA = dB = None
    if need_AB:
        assert prepared.a_low is not None
        assert prepared.b_low is not None
        dB = _mm_fp32(G, prepared.a_low.t())
        dB = dB if c == 1 else dB.mul_(c)
        dA = _mm_fp32(prepared.b_low.t(), G)
    return dshift, dA, dB


def project(
    G: torch.Tensor,
    base: torch.Tensor,
    scale0: torch.Tensor,
    zero_point: torch.Tensor | None,
    prepared: Prepared,
    fmt: BaseFormat,
    need_shift: bool,
    need_AB: bool,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Turn G (out, in) into dZ = M s G in place, where `need_AB`, and return the gradient of the shift, fp32.

    Args:
        bounds: see `prepared_weight`; G counts as 0 where an expert has no tokens, whatever it holds.
    """
    rows, words = base.shape
    stack = 1 if bounds is None else bounds.shape[0] - 1
    constants = (scale0.shape[1], fmt, prepared.offsets, prepared.rank, need_AB, stack)
    launch, columns = _launch_by_G(rows // stack, words, *constants)
    sums = torch.empty(rows, columns, dtype=torch.float32, device=base.device) if need_shift else None
    zero_point = None if zero_point is None else zero_point.contiguous()
    launch(G, sums, base, zero_point, prepared.scale, prepared.buffer, bounds)
    if sums is None:
        return None
    dshift = sum_per_scale(sums, scale0)
    if prepared.offsets.by_channel:
        scale = prepared.scale[: scale0.numel()].view_as(scale0)
        return shift_gradient_by_row(dshift, scale, *prepared.row_steps(scale0))
    return dshift.mul_(scale0)


@launched
@triton.jit
def _by_G_kernel(
    G,
    sums,
    base,
    zero_point,
    scale,
    factors,
    bounds,
    scale_stride,
    units,
    step,
    a_step,
    b_step,
    a_int,
    b_int,
    words,
    in_features,
    out_features,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    BITS: tl.constexpr,
    DOWNCAST: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FULL: tl.constexpr,
    WRITE: tl.constexpr,
):
    """Turn G into M s G in place, and sum G Q over each row of the tile."""
    n, m = tl.program_id(0), tl.program_id(1)
    j, row_ok, expert = tile_rows(m, out_features, bounds, BM)
    i, column_ok, group, first = tile_columns(n, GROUP, BN)
    a, a_steps = first_a(factors, a_int, a_step, expert, i, column_ok, in_features, RANK, FULL)
    z = rounded_levels(
        base, factors, scale_stride, units, b_step, a_int, b_int, a, a_steps, expert, j, i, group, first, row_ok,
        column_ok, words, in_features, RANK, BITS, DOWNCAST, BY_CHANNEL, FULL,
    )  # fmt: skip
    q = clip(z, BITS)
    inside = row_ok[:, None] & column_ok[None, :]
    at = G + j.to(tl.int64)[:, None] * in_features + i[None, :]
    g = load(at, inside, FULL).to(tl.float32)
    if bounds is not None:
        g = tl.where(tl.load(bounds + expert) < tl.load(bounds + expert + 1), g, 0.0)
    if sums is not None:
        level = q
        if zero_point is not None:
            level = q - load(zero_point + j * scale_stride + group, row_ok, FULL).to(tl.float32)[:, None]
        total = tl.sum(tl.where(inside, g * level, 0.0), 1)
        tl.store(sums + j * tl.num_programs(0) + n, total, mask=row_ok)
    if WRITE:
        s = adapter_step(scale, factors, scale_stride, step, j, group, row_ok, BY_CHANNEL, FULL)
        store(at, tl.where(q == z, g * s[:, None], 0.0), inside, FULL)
