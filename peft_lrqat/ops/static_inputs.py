"""Rounding a layer's input with one fixed scale, which is learned (LSQ, arXiv 1902.08153): static activations.

    y = clip(round(x / a)) a

as compressed-tensors computes it, in x's dtype. Inside of the grid the gradient passes straight through, and a's is
round(x / a) - x / a; outside, x has none, and a's is the end of the grid. A checkpoint stores a as it stores scales, so
the parameter is log2 of it: one learning rate then suits it and the relative change of the weights' scales.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..grid import snap_scale


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log2: Tensor, scale_dtype: str) -> Tensor:
        # in fp64: whatever device computes it, the fp32 number that is snapped is the same
        scale = snap_scale(log2.double().exp2().float(), scale_dtype)
        ctx.save_for_backward(scale)
        ctx.dtype = log2.dtype
        return scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return (grad * scale * math.log(2)).to(ctx.dtype), None


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        ctx.save_for_backward(x, scale)
        step = scale.to(x.dtype)
        return (x / step).round().clamp(*_ends(bits)) * step

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scale = ctx.saved_tensors
        low, high = _ends(ctx.bits)
        levels = x / scale.to(x.dtype)
        rounded = levels.round()
        inside = (rounded >= low) & (rounded <= high)
        dx = dscale = None
        if ctx.needs_input_grad[0]:
            dx = dy * inside
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, rounded - levels, rounded.clamp(low, high))
            dscale = (dy.float() * slope.float()).sum().view(scale.shape)
        return dx, dscale, None


def _ends(bits: int) -> tuple[float, float]:
    return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1


def static_scale(log2: Tensor, scale_dtype: str) -> Tensor:
    """Compute the scale that a checkpoint stores, straight through the snapping.

    Args:
        log2: (1,), any float dtype. Differentiable.
        scale_dtype: what it is snapped to, see `grid.snap_scale`.

    Returns:
        fp32 (1,), units of the input per grid step.
    """
    return _Scale.apply(log2, scale_dtype)


def round_static(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Round a layer's input with a fixed scale.

    Args:
        x: (..., in), any float dtype. Differentiable.
        scale: (1,), any float dtype, positive. Differentiable.
        bits: of the grid.

    Returns:
        (..., in) in x's dtype.
    """
    return _Round.apply(x, scale, bits)
