"""Rounding keys or values by vLLM's rule: the rotation, the scale of a token and head, the rounding, the way back and
the write in one pass.

A row is what a head has of a token. The arithmetic is that of `ops/reference_cache.py`, operation for operation, so the
numbers are equal (a zero may have another sign).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..reference_cache import rotated_together, rotation_signs
from .launch import Launch, in_order_of, launched, without_gaps
from .tiles import as_stored, ceil_div, largest_magnitude, load, power_of_2, store

#: Elements that a program works on, where a head has fewer.
_TILE = 2048


@triton.jit
def _half_away(x):
    """Round to whole numbers: add a half to the magnitude, and cut."""
    return tl.where(x >= 0.0, tl.floor(x + 0.5), tl.ceil(x - 0.5))


@triton.jit
def _cut(x, low, high):
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _scale(span, STEPS: tl.constexpr):
    """Find the scale of each row: fp32 (BM,), of a magnitude or range that has so many steps."""
    steps = tl.zeros_like(span) + STEPS
    return tl.maximum(tl.div_rn(span, steps), 1e-6, tl.PropagateNan.ALL)


@triton.jit
def _butterfly(x, HALF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Replace numbers of fp32 (BM, BN) that are HALF columns apart by their sum and difference.

    A sum of two is the same number in either order, so reductions make both: they stay inside of a thread or a warp.
    """
    pairs = tl.reshape(x, (BM * BN // (2 * HALF), 2, HALF))
    second = tl.arange(0, 2)[None, :, None]
    sums = tl.sum(pairs, 1, keep_dims=True)
    differences = tl.sum(pairs * (1 - 2 * second).to(tl.float32), 1, keep_dims=True)
    return tl.reshape(tl.where(second == 0, sums, differences), (BM, BN))


@triton.jit
def _hadamard(x, LOG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Multiply each 2^LOG columns of fp32 (BM, BN) by Sylvester's matrix, in the reference's order."""
    for step in tl.static_range(LOG):
        x = _butterfly(x, 1 << step, BM, BN)
    return x


@launched
@triton.jit
def _int8_kernel(out, states, rows, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FULL: tl.constexpr):
    j, i = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)[None, :]
    at, ok = j.to(tl.int64)[:, None] * WIDTH + i, (j < rows)[:, None] & (i < WIDTH)
    x = load(states + at, ok, FULL).to(tl.float32)
    scale = _scale(largest_magnitude(x).to(tl.float32, bitcast=True), 127.0)[:, None]
    inverse = tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
    store(out + at, _cut(_half_away(x * inverse), -128.0, 127.0) * scale, ok, FULL)


@launched
@triton.jit
def _int4_kernel(
    out, states, signs, rows, WIDTH: tl.constexpr, LOG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    j, i = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)[None, :]
    column_ok = i < WIDTH
    at, ok = j.to(tl.int64)[:, None] * WIDTH + i, (j < rows)[:, None] & column_ok
    turn = tl.load(signs + i % (1 << LOG))
    x = as_stored(_hadamard(load(states + at, ok, FULL).to(tl.float32) * turn, LOG, BM, BN), out)
    low = tl.min(tl.where(column_ok, x, float("inf")), 1)
    high = tl.max(tl.where(column_ok, x, float("-inf")), 1)
    nan = tl.max((x != x).to(tl.int32), 1) > 0  # of which neither hears
    scale = _scale(tl.where(nan, float("nan"), high - low), 15.0)
    zero = _cut(_half_away(tl.div_rn(-low, scale)), 0.0, 15.0)[:, None]
    inverse = tl.div_rn(tl.zeros_like(scale) + 1.0, scale)[:, None]
    levels = _cut(_half_away(x * inverse + zero), 0.0, 15.0)
    stored = (scale.to(tl.int32, bitcast=True) & -16).to(tl.float32, bitcast=True)[:, None]
    back = _hadamard((levels - zero) * stored, LOG, BM, BN)
    store(out + at, back * turn * (1.0 / (1 << LOG)), ok, FULL)  # a power of two: nothing is rounded


@functools.lru_cache(maxsize=1024)
def _launch(rows: int, width: int, bits: int) -> Launch:
    BN = power_of_2(width)
    BM = max(1, _TILE // BN)
    kernel, log = (_int8_kernel, {}) if bits == 8 else (_int4_kernel, {"LOG": rotated_together(width).bit_length() - 1})
    return kernel.launch(
        (ceil_div(rows, BM),), rows, fused=False, WIDTH=width, **log, BM=BM, BN=BN, FULL=width == BN and rows % BM == 0
    )


def rounded_states(states: torch.Tensor, bits: int) -> torch.Tensor:
    """Compute what `reference_cache.rounded_states` does."""
    states, order = without_gaps(states)
    out, width = torch.empty_like(states), states.shape[-1]
    if out.numel():
        signs = () if bits == 8 else (rotation_signs(rotated_together(width), states.device),)
        _launch(out.numel() // width, width, bits)(out, states, *signs)
    return in_order_of(out, order)
