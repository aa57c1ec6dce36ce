"""Rounding a layer's input with a fixed scale in one launch, and its gradients in two.

Who learns the scale gives log2 of it, and every program makes the scale of it. For backward a program leaves one number
of what the scale's gradient is the sum of; a second kernel adds these up.

The arithmetic is that of `ops/reference_inputs.py`, operation for operation, so all numbers are equal (a zero may have
another sign), but for the scale's gradient: its sum is taken in another order, which is the same in every run.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ...grid import scale_bounds
from .launch import Kernel, Launch, in_order_of, launched, without_gaps
from .tiles import as_stored, bf16_bits, ceil_div, clip, load, power_of_2, round_half_even, store

#: Elements that a program works on at a time, and how many programs there are at most: what a large GPU runs at once,
#: and what one program can add up.
_BLOCK, _PROGRAMS = 2048, 2048


@triton.jit
def _snapped(scale, SCALE_DTYPE: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """Compute `grid.snap_magnitude` of fp32 numbers."""
    scale = tl.maximum(scale, SMALLEST, tl.PropagateNan.ALL)
    if SCALE_DTYPE == "fp32":
        return scale
    if SCALE_DTYPE != "bf16":
        scale = tl.minimum(scale, LARGEST, tl.PropagateNan.ALL)
    if SCALE_DTYPE == "fp16":
        return scale.to(tl.float16).to(tl.float32)
    wide = tl.where(scale == scale, bf16_bits(scale), scale)
    if SCALE_DTYPE == "bf16":
        return wide
    return tl.where(scale < 1.0 / 131072, round_half_even(scale * 16777216.0) * (1.0 / 16777216), wide)


@triton.jit
def _scale(scale, SCALE_DTYPE: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """Load the scale, or compute it as `reference_inputs.input_scale` does: fp32 (1,)."""
    given = tl.load(scale + tl.arange(0, 1)).to(tl.float32)
    if SCALE_DTYPE is None:
        return given
    else:
        return _snapped(tl.exp2(given.to(tl.float64)).to(tl.float32), SCALE_DTYPE, SMALLEST, LARGEST)


@triton.jit
def _levels(x, step, at, ok, FULL: tl.constexpr):
    """Load x / a in x's dtype: fp32."""
    values = load(x + at, ok, FULL).to(tl.float32)
    return as_stored(tl.div_rn(values, step + tl.zeros_like(values)), x)


@launched
@triton.jit
def _kernel(
    out, x, scale, count, parts, BITS: tl.constexpr, SCALE_DTYPE: tl.constexpr, SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    step = as_stored(_scale(scale, SCALE_DTYPE, SMALLEST, LARGEST), x)
    first = tl.program_id(0).to(tl.int64) * parts * BLOCK
    for part in range(parts):
        at = first + part * BLOCK + tl.arange(0, BLOCK)
        ok = at < count
        store(out + at, clip(round_half_even(_levels(x, step, at, ok, FULL)), BITS) * step, ok, FULL)


@launched
@triton.jit
def _gradients_kernel(
    dx, sums, dy, x, scale, count, parts, BITS: tl.constexpr, SCALE_DTYPE: tl.constexpr, SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    step = as_stored(_scale(scale, SCALE_DTYPE, SMALLEST, LARGEST), x)
    first = tl.program_id(0).to(tl.int64) * parts * BLOCK
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(parts):
        at = first + part * BLOCK + tl.arange(0, BLOCK)
        ok = at < count
        levels = _levels(x, step, at, ok, FULL)
        rounded = round_half_even(levels)
        cut = clip(rounded, BITS)
        inside = rounded == cut
        gradient = load(dy + at, ok, FULL).to(tl.float32)
        if dx is not None:
            store(dx + at, gradient * tl.where(inside, 1.0, 0.0), ok, FULL)
        if sums is not None:
            slope = tl.where(inside, rounded - levels, cut)
            total += tl.where(ok, gradient * slope, 0.0)
    if sums is not None:
        tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@launched
@triton.jit
def _sum_kernel(
    dscale, sums, scale, count, SCALE_DTYPE: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(sums + i, mask=i < count, other=0.0), 0) + tl.zeros((1,), dtype=tl.float32)
    if SCALE_DTYPE is not None:
        total = total * _scale(scale, SCALE_DTYPE, SMALLEST, LARGEST) * 0.6931471805599453
    store(dscale + tl.arange(0, 1), total, True, True)


def _snapping(scale_dtype: str | None) -> dict[str, Any]:
    smallest, largest = (0.0, 0.0) if scale_dtype is None else scale_bounds(scale_dtype)
    return {"SCALE_DTYPE": scale_dtype, "SMALLEST": smallest, "LARGEST": largest}


@functools.lru_cache(maxsize=1024)
def _launch(kernel: Kernel, count: int, bits: int, scale_dtype: str | None) -> Launch:
    """The grid of this launch, one program for each sum."""
    parts = ceil_div(ceil_div(count, _BLOCK), _PROGRAMS)
    each = parts * _BLOCK
    constants: dict[str, Any] = {"BITS": bits, **_snapping(scale_dtype), "BLOCK": _BLOCK, "FULL": count % each == 0}
    return kernel.launch((ceil_div(count, each),), count, parts, fused=False, **constants)


@functools.lru_cache(maxsize=64)
def _sum_launch(count: int, scale_dtype: str | None) -> Launch:
    return _sum_kernel.launch((1,), count, fused=False, **_snapping(scale_dtype), BLOCK=power_of_2(count))


def rounded_static(x: torch.Tensor, scale: torch.Tensor, bits: int, scale_dtype: str | None = None) -> torch.Tensor:
    """Compute what `reference_inputs.rounded_static` does."""
    x, order = without_gaps(x)
    out = torch.empty_like(x)
    if out.numel():
        _launch(_kernel, x.numel(), bits, scale_dtype)(out, x, scale)
    return in_order_of(out, order)


def static_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    scale_dtype: str | None,
    need_x: bool,
    need_scale: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what `reference_inputs.static_gradients` does, the scale's up to the order of the sum."""
    x, order = without_gaps(x)
    dy = (dy if order is None else dy.permute(order)).contiguous()
    dx = torch.empty_like(dy) if need_x else None
    dscale = torch.empty_like(scale) if need_scale else None
    if x.numel() and (need_x or need_scale):
        launch = _launch(_gradients_kernel, x.numel(), bits, scale_dtype)
        programs = launch.grid[0]
        sums = dy.new_empty(programs, dtype=torch.float32) if need_scale else None
        launch(dx, sums, dy, x, scale)
        if dscale is not None:
            _sum_launch(programs, scale_dtype)(dscale, sums, scale)
    elif dscale is not None:
        dscale.zero_()
    return (
        dy.new_empty(0) if dx is None else in_order_of(dx, order),
        scale.new_empty(0) if dscale is None else dscale,
    )
