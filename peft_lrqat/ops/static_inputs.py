"""Rounding a layer's input with one fixed scale, which is learned (LSQ, arXiv 1902.08153): static activations.

    y = clip(round(x / a)) a

as compressed-tensors computes it, in x's dtype. Inside of the grid the gradient passes straight through, and a's is
round(x / a) - x / a; outside, x has none, and a's is the end of the grid. A checkpoint stores a as it stores scales, so
the parameter is log2 of it: one learning rate then suits it and the relative change of the weights' scales.

torch.compile gets operations, which it does not take apart: its own code keeps x / a in fp32 where x is in bf16, which
makes other numbers of many inputs than the checkpoint does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import reference_inputs
from .dispatch import kernels_for, on_device_of


def _kernels_for(x: Tensor, scale: Tensor) -> Any:
    """Choose what runs, as for all operations. The kernels know no fp64, and take no scale that lies elsewhere."""
    near = scale.device == x.device and torch.float64 not in (x.dtype, scale.dtype)
    return (kernels_for(x) if near else None) or reference_inputs


def _scale(log2: Tensor, scale_dtype: str) -> Tensor:
    with on_device_of(log2):
        return _kernels_for(log2, log2).input_scale(log2, scale_dtype)


_scale_op = torch.library.custom_op("peft_lrqat::static_scale", _scale, mutates_args=())
_scale_op.register_fake(lambda log2, scale_dtype: torch.empty_like(log2, dtype=torch.float32))


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log2: Tensor, scale_dtype: str) -> Tensor:
        scale = (_scale_op if torch.compiler.is_compiling() else _scale)(log2, scale_dtype)
        ctx.save_for_backward(scale)
        ctx.dtype = log2.dtype
        return scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return (grad * scale * math.log(2)).to(ctx.dtype), None


def _rounded(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    with on_device_of(x):
        return _kernels_for(x, scale).rounded_static(x, scale, bits)


def _gradients(
    dy: Tensor, x: Tensor, scale: Tensor, bits: int, need_x: bool, need_scale: bool
) -> tuple[Tensor, Tensor]:
    with on_device_of(x):
        return _kernels_for(x, scale).static_gradients(dy, x, scale, bits, need_x, need_scale)


@torch.library.custom_op("peft_lrqat::round_static", mutates_args=())
def _rounded_op(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    return _rounded(x, scale, bits).contiguous()


@_rounded_op.register_fake
def _(x, scale, bits):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("peft_lrqat::round_static_backward", mutates_args=())
def _gradients_op(
    dy: Tensor, x: Tensor, scale: Tensor, bits: int, need_x: bool, need_scale: bool
) -> tuple[Tensor, Tensor]:
    dx, dscale = _gradients(dy, x, scale, bits, need_x, need_scale)
    return dx.contiguous(), dscale


@_gradients_op.register_fake
def _(dy, x, scale, bits, need_x, need_scale):
    return (
        torch.empty_like(dy, memory_format=torch.contiguous_format) if need_x else dy.new_empty(0),
        scale.new_empty(scale.shape if need_scale else 0, dtype=torch.float32),
    )


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        ctx.save_for_backward(x, scale)
        return (_rounded_op if torch.compiler.is_compiling() else _rounded)(x, scale, bits)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scale = ctx.saved_tensors
        need_x, need_scale = ctx.needs_input_grad[:2]
        run = _gradients_op if torch.compiler.is_compiling() else _gradients
        dx, dscale = run(dy, x, scale, ctx.bits, need_x, need_scale)
        return dx if need_x else None, dscale if need_scale else None, None


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
