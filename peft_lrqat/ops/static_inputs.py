"""Rounding a layer's input with one fixed scale, which is learned (LSQ, arXiv 1902.08153): static activations.

    y = clip(round(x / a)) a

as compressed-tensors computes it, in x's dtype. Inside of the grid the gradient passes straight through, and a's is
round(x / a) - x / a; outside, x has none, and a's is the end of the grid. A checkpoint stores a as it stores scales, so
the parameter is log2 of it: one learning rate then suits it and the relative change of the weights' scales.

A layer's product does both in its own autograd function, of which a step has hundreds: it multiplies the values that x
was rounded to, keeps x for backward, and ends with `rounding_gradients`.

torch.compile gets operations, which it does not take apart: its own code keeps x / a in fp32 where x is in bf16, which
makes other numbers of many inputs than the checkpoint does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference_inputs
from .dispatch import kernels_for, on_device_of


class LearnedScale(NamedTuple):
    """The fixed scale of a layer's input while it is learned."""

    log2: Tensor
    """(1,), any float dtype: log2 of the scale before it is snapped. Differentiable."""
    scale_dtype: str
    """What the scale is snapped to, straight through: see `grid.snap_scale`."""
    bits: int
    """Of the grid."""


def _kernels_for(x: Tensor, scale: Tensor) -> Any:
    """Choose what runs, as for all operations. The kernels know no fp64, and take no scale that lies elsewhere."""
    near = scale.device == x.device and torch.float64 not in (x.dtype, scale.dtype)
    return (kernels_for(x) if near else None) or reference_inputs


def _rounded(x: Tensor, scale: Tensor, bits: int, scale_dtype: str | None) -> Tensor:
    with on_device_of(x):
        return _kernels_for(x, scale).rounded_static(x, scale, bits, scale_dtype)


def _gradients(
    dy: Tensor, x: Tensor, scale: Tensor, bits: int, scale_dtype: str | None, need_x: bool, need_scale: bool
) -> tuple[Tensor, Tensor]:
    with on_device_of(x):
        return _kernels_for(x, scale).static_gradients(dy, x, scale, bits, scale_dtype, need_x, need_scale)


@torch.library.custom_op("peft_lrqat::round_static", mutates_args=())
def _rounded_op(x: Tensor, scale: Tensor, bits: int, scale_dtype: str | None) -> Tensor:
    return _rounded(x, scale, bits, scale_dtype).contiguous()


@_rounded_op.register_fake
def _(x, scale, bits, scale_dtype):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("peft_lrqat::round_static_backward", mutates_args=())
def _gradients_op(
    dy: Tensor, x: Tensor, scale: Tensor, bits: int, scale_dtype: str | None, need_x: bool, need_scale: bool
) -> tuple[Tensor, Tensor]:
    dx, dscale = _gradients(dy, x, scale, bits, scale_dtype, need_x, need_scale)
    return dx.contiguous(), dscale


@_gradients_op.register_fake
def _(dy, x, scale, bits, scale_dtype, need_x, need_scale):
    return (
        torch.empty_like(dy, memory_format=torch.contiguous_format) if need_x else dy.new_empty(0),
        scale.new_empty(scale.shape if need_scale else 0),
    )


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bits: int, scale_dtype: str | None) -> Tensor:
        ctx.how = bits, scale_dtype
        ctx.save_for_backward(x, scale)
        return (_rounded_op if torch.compiler.is_compiling() else _rounded)(x, scale, bits, scale_dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale = ctx.saved_tensors
        need_x, need_scale = ctx.needs_input_grad[:2]
        bits, scale_dtype = ctx.how
        run = _gradients_op if torch.compiler.is_compiling() else _gradients
        dx, dscale = run(dy, x, scale, bits, scale_dtype, need_x, need_scale)
        return dx if need_x else None, dscale if need_scale else None, None, None


def static_scale(log2: Tensor, scale_dtype: str) -> Tensor:
    """Compute the scale that a checkpoint stores, without a gradient.

    Args:
        log2, scale_dtype: as in `LearnedScale`.

    Returns:
        fp32 (1,), units of the input per grid step.
    """
    return reference_inputs.input_scale(log2.detach(), scale_dtype)


def round_static(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Round a layer's input with a fixed scale.

    Args:
        x: (..., in), any float dtype. Differentiable.
        scale: (1,), any float dtype, positive. Differentiable.
        bits: of the grid.

    Returns:
        (..., in) in x's dtype.
    """
    return _Round.apply(x, scale, bits, None)


def round_learned(x: Tensor, learned: LearnedScale) -> Tensor:
    """Round a layer's input with a fixed scale that is being learned.

    Args:
        x: (..., in), any float dtype. Differentiable, as the scale is.

    Returns:
        (..., in) in x's dtype.
    """
    return _Round.apply(x, learned.log2, learned.bits, learned.scale_dtype)


def learned_values(x: Tensor, learned: LearnedScale) -> Tensor:
    """Compute the numbers that `round_learned` returns.

    Args:
        x: without a graph.
    """
    return _rounded(x, learned.log2.detach(), learned.bits, learned.scale_dtype)


def rounding_gradients(
    dy: Tensor, x: Tensor, learned: LearnedScale, need_x: bool, need_scale: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of an input that was rounded, and of log2 of the scale.

    Args:
        dy: of what x was rounded to, of x's shape.
        x: as it was before, in any dtype: it was cast to dy's dtype and rounded in it.
        need_x, need_scale: which gradients are needed.

    Returns:
        dx, in dy's dtype, and that of log2, as far as they are needed.
    """
    log2, scale_dtype, bits = learned
    dx, dlog2 = _gradients(dy, x.to(dy.dtype), log2, bits, scale_dtype, need_x, need_scale)
    return dx if need_x else None, dlog2 if need_scale else None
