"""Rounding a layer's input with a fixed scale, its gradients, and the scale itself: one launch each.

The arithmetic is that of `ops/reference_inputs.py`, operation for operation, so all numbers are equal (a zero may have
another sign), but for the scale's gradient: its sum is taken in another order, which is the same in every run.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ...grid import scale_bounds
from .launch import Kernel, Launch, in_order_of, launched, without_gaps
from .tiles import as_stored, bf16_bits, ceil_div, clip, load, power_of_2, round_half_even, store

#: Elements that a program works on.
_BLOCK = 2048


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


@launched
@triton.jit
def _scale_kernel(
    scale, log2, count, SCALE_DTYPE: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    exact = tl.exp2(tl.load(log2 + i, mask=i < count, other=0.0).to(tl.float32).to(tl.float64))
    tl.store(scale + i, _snapped(exact.to(tl.float32), SCALE_DTYPE, SMALLEST, LARGEST), mask=i < count)


@triton.jit
def _block(count, BLOCK: tl.constexpr):
    """Return the indices of this program's elements, and which of them there are."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < count


@triton.jit
def _levels(x, scale, at, ok, FULL: tl.constexpr):
    """Return x / a in x's dtype, and a, rounded to it: fp32."""
    step = as_stored(tl.load(scale).to(tl.float32), x)
    values = load(x + at, ok, FULL).to(tl.float32)
    return as_stored(tl.div_rn(values, step + tl.zeros_like(values)), x), step


@launched
@triton.jit
def _kernel(out, x, scale, count, BITS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    at, ok = _block(count, BLOCK)
    levels, step = _levels(x, scale, at, ok, FULL)
    store(out + at, clip(round_half_even(levels), BITS) * step, ok, FULL)


@launched
@triton.jit
def _gradients_kernel(
    dx, sums, dy, x, scale, count, BITS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    at, ok = _block(count, BLOCK)
    levels, _ = _levels(x, scale, at, ok, FULL)
    rounded = round_half_even(levels)
    cut = clip(rounded, BITS)
    inside = rounded == cut
    gradient = load(dy + at, ok, FULL).to(tl.float32)
    if dx is not None:
        store(dx + at, gradient * tl.where(inside, 1.0, 0.0), ok, FULL)
    if sums is not None:
        slope = tl.where(inside, rounded - levels, cut)
        tl.store(sums + tl.program_id(0), tl.sum(tl.where(ok, gradient * slope, 0.0), 0))


@functools.lru_cache(maxsize=1024)
def _launch(kernel: Kernel, count: int, bits: int) -> Launch:
    return kernel.launch(
        (ceil_div(count, _BLOCK),), count, fused=False, BITS=bits, BLOCK=_BLOCK, FULL=count % _BLOCK == 0
    )


@functools.lru_cache(maxsize=64)
def _scale_launch(count: int, scale_dtype: str) -> Launch:
    smallest, largest = scale_bounds(scale_dtype)
    return _scale_kernel.launch(
        (1,), count, warps=1, SCALE_DTYPE=scale_dtype, SMALLEST=smallest, LARGEST=largest, BLOCK=power_of_2(count)
    )


def input_scale(log2: torch.Tensor, scale_dtype: str) -> torch.Tensor:
    """Compute what `reference_inputs.input_scale` does."""
    log2 = log2.contiguous()
    scale = torch.empty_like(log2, dtype=torch.float32)
    _scale_launch(log2.numel(), scale_dtype)(scale, log2)
    return scale


def rounded_static(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Compute what `reference_inputs.rounded_static` does."""
    x, order = without_gaps(x)
    out = torch.empty_like(x)
    if out.numel():
        _launch(_kernel, x.numel(), bits)(out, x, scale)
    return in_order_of(out, order)


def static_gradients(
    dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, bits: int, need_x: bool, need_scale: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what `reference_inputs.static_gradients` does, the scale's up to the order of the sum."""
    x, order = without_gaps(x)
    dy = (dy if order is None else dy.permute(order)).contiguous()
    dx = torch.empty_like(dy) if need_x else None
    sums = x.new_empty(ceil_div(x.numel(), _BLOCK), dtype=torch.float32) if need_scale else None
    if x.numel() and (need_x or need_scale):
        _launch(_gradients_kernel, x.numel(), bits)(dx, sums, dy, x, scale)
    return (
        dy.new_empty(0) if dx is None else in_order_of(dx, order),
        scale.new_empty(0, dtype=torch.float32) if sums is None else sums.sum().view(scale.shape),
    )
