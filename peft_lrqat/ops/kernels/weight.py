"""W^ in one pass: unpack, add B~ A~, round, clip, scale."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..stored_base import BaseFormat
from .launch import Launch, launched
from .prepare import Offsets, Prepared, prepare
from .tiles import clip, first_a, load, rounded_levels, scale_stride, store, tile_columns, tile_rows, tiling


@triton.jit
def _either(a, b):
    return a | b


@launched
@triton.jit
def _weight_kernel(
    weight,
    flags,
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
    LOOP: tl.constexpr,
):
    n = tl.program_id(0)
    whose = tl.program_id(1) * LOOP // tl.cdiv(out_features, BM)  # the tiles of a program are one expert's
    if bounds is not None and tl.load(bounds + whose) == tl.load(bounds + whose + 1):
        return
    i, column_ok, group, first = tile_columns(n, GROUP, BN)
    a, a_steps = first_a(factors, a_int, a_step, whose, i, column_ok, in_features, RANK, FULL)
    for turn in tl.range(0, LOOP, num_stages=3):
        m = tl.program_id(1) * LOOP + turn
        j, row_ok, expert = tile_rows(m, out_features, bounds, BM)
        z = rounded_levels(
            base, factors, scale_stride, units, b_step, a_int, b_int, a, a_steps, expert, j, i, group, first, row_ok,
            column_ok, words, in_features, RANK, BITS, DOWNCAST, BY_CHANNEL, FULL,
        )  # fmt: skip
        q = clip(z, BITS)
        inside = row_ok[:, None] & column_ok[None, :]
        if flags is not None:
            changed = q.to(tl.int32, bitcast=True) ^ z.to(tl.int32, bitcast=True)
            changed = tl.reshape(tl.where(inside, changed, 0), (BM * BN,), can_reorder=True)
            tl.store(flags + m * tl.num_programs(0) + n, (tl.reduce(changed, 0, _either) != 0).to(tl.int32))
        if zero_point is not None:
            q = q - load(zero_point + j * scale_stride + group, row_ok, FULL).to(tl.float32)[:, None]
        s = load(scale + j * scale_stride + group, row_ok, FULL)
        store(weight + j.to(tl.int64)[:, None] * in_features + i[None, :], q * s[:, None], inside, FULL)


@functools.lru_cache(maxsize=4096)
def _launch(rows: int, words: int, groups: int, fmt: BaseFormat, offsets: Offsets, rank: int, stack: int) -> Launch:
    tiles = tiling(rows, fmt.in_features, groups, stack=stack)
    return _weight_kernel.launch(
        tiles.grid,
        *offsets,
        words,
        fmt.in_features,
        rows,
        fused=not offsets.by_channel,
        **tiles.constants(fmt, rank, offsets.by_channel),
        LOOP=tiles.loop,
    )


@functools.lru_cache(maxsize=1024)
def launch_without_adapter(rows: int, words: int, in_features: int, scales: tuple[int, int], bits: int) -> Launch:
    """Fix the launch for packed codes alone, by what a caller has at hand: low-bit SR's, which makes three a step."""
    return _launch(rows, words, scales[1], BaseFormat(bits, in_features, "int"), Offsets(scale_stride(scales)), 0, 1)


def linear_weight(
    base: torch.Tensor,
    scale0: torch.Tensor,
    shift: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    c: float,
    fmt: BaseFormat,
    scale_dtype: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Build what `reference.linear_weight` does, bit for bit."""
    prepared = prepare(scale0, shift, scale_dtype, A, B, c, base.shape[0])
    return prepared_weight(base.contiguous(), scale0.shape[1], zero_point, prepared, fmt, dtype)


def prepared_weight(
    base: torch.Tensor,
    groups: int,
    zero_point: torch.Tensor | None,
    prepared: Prepared,
    fmt: BaseFormat,
    dtype: torch.dtype,
    flags: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Build W^ from a contiguous base and what `prepare` made of the rest: (out, in) in `dtype`.

    Args:
        groups: scales a row has.
        flags: int32 (tiles,), receives 1 for each tile with a clipped entry.
        bounds: of a stack of n experts, int32 (n + 1,): where the tokens of each begin, and end. The weights of those
            without tokens are not written.
    """
    rows, words = base.shape
    stack = 1 if bounds is None else bounds.shape[0] - 1
    weight = torch.empty(rows, fmt.in_features, dtype=dtype, device=base.device)
    if weight.numel():
        launch = _launch(rows // stack, words, groups, fmt, prepared.offsets, prepared.rank, stack)
        zero_point = None if zero_point is None else zero_point.contiguous()
        launch(weight, flags, base, zero_point, prepared.scale, prepared.buffer, bounds)
    return weight
