"""The operations as `torch.library` ops: schema, fake implementation and autograd in one place.

`torch.compile` sees one opaque node with known shapes (no graph break), both kinds of gradient checkpointing see an
ordinary differentiable op, and a kernel for another device can be registered beside the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..grid import snap_scale
from .backward import keeps_output, linear_backward
from .reference import BaseFormat, build_weight

_NAMESPACE = "peft_lrqat"


@torch.library.custom_op(f"{_NAMESPACE}::snap_scale", mutates_args=())
def _snap_scale(scale: Tensor, scale_dtype: str) -> Tensor:
    # a custom op may not return its input, and clamp of an in-range tensor is a new tensor
    return snap_scale(scale, scale_dtype)


@_snap_scale.register_fake
def _(scale: Tensor, scale_dtype: str) -> Tensor:
    return torch.empty_like(scale)


_snap_scale.register_autograd(lambda ctx, grad: (grad, None))


def snap_scale_ste(scale: Tensor, scale_dtype: str) -> Tensor:
    """`snap_scale` with a straight-through gradient: the master moves freely, the forward sees what is stored."""
    return _snap_scale(scale, scale_dtype)


@torch.library.custom_op(f"{_NAMESPACE}::quantized_linear", mutates_args=())
def _linear(
    x: Tensor,
    base: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    bits: int,
    downcast: str,
) -> Tensor:
    fmt = BaseFormat(bits, x.shape[-1], downcast)
    weight = build_weight(base, scale, zero_point, A, B, fmt, x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.linear(x, weight, bias)


@_linear.register_fake
def _(x, base, scale, zero_point, A, B, bias, bits, downcast):
    return x.new_empty(*x.shape[:-1], base.shape[0])


@torch.library.custom_op(f"{_NAMESPACE}::quantized_linear_backward", mutates_args=())
def _linear_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    base: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    bits: int,
    downcast: str,
    need_x: bool,
    need_scale: bool,
    need_AB: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fmt = BaseFormat(bits, x.shape[-1], downcast)
    flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    flat_y = None if y is None else y.reshape(-1, y.shape[-1])
    with torch.autocast(dy.device.type, enabled=False):
        grads = linear_backward(
            flat_dy, flat_x, flat_y, base, scale, zero_point, A, B, fmt, need_x, need_scale, need_AB
        )
    dx = x.new_empty(0) if grads.x is None else grads.x.view(x.shape)
    # an op cannot return None, so what was not asked for is empty
    ds, dA, dB = (scale.new_empty(0) if g is None else g for g in grads[1:])
    return dx, ds, dA, dB


@_linear_backward.register_fake
def _(dy, x, y, base, scale, zero_point, A, B, bits, downcast, need_x, need_scale, need_AB):
    nothing = scale.new_empty(0)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0),
        torch.empty_like(scale) if need_scale else nothing,
        A.new_empty(A.shape, dtype=torch.float32) if need_AB and A is not None else scale.new_empty(0),
        B.new_empty(B.shape, dtype=torch.float32) if need_AB and B is not None else scale.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, base, scale, zero_point, A, B, bias, ctx.bits, ctx.downcast = inputs
    # Y spares the scale gradient a dense product where a scale belongs to a whole row. With a bias, Y - bias would
    # cancel in low precision, so there the product is made.
    keep_y = ctx.needs_input_grad[2] and keeps_output(scale, x.device) and bias is None
    needs_weights = any(ctx.needs_input_grad[i] for i in (2, 4, 5))
    # without gradients of the weight's side, X itself is not needed: only its shape and dtype, for dX
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x if needs_weights else None, output if keep_y else None, base, scale, zero_point, A, B)


def _backward(ctx, dy: Tensor):
    x, y, base, scale, zero_point, A, B = ctx.saved_tensors
    need_x, need_scale = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    need_AB = A is not None and (ctx.needs_input_grad[4] or ctx.needs_input_grad[5])
    if x is None:
        x = torch.empty((), dtype=ctx.x_dtype, device=dy.device).expand(ctx.x_shape)
    dx, ds, dA, dB = _linear_backward(
        dy, x, y, base, scale, zero_point, A, B, ctx.bits, ctx.downcast, need_x, need_scale, need_AB
    )
    dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[6] else None
    return (
        dx if need_x else None,
        None,
        ds if need_scale else None,
        None,
        dA.to(A.dtype) if need_AB else None,
        dB.to(B.dtype) if need_AB else None,
        dbias,
        None,
        None,
    )


_linear.register_autograd(_backward, setup_context=_setup_context)


def quantized_linear(
    x: Tensor,
    base: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    bits: int,
    downcast: str,
) -> Tensor:
    """y = x W^T + bias with W^ = s * (clip(round(Phi + B A)) - z) (LR-QAT, arXiv 2406.06385, eq. 8).

    Args:
        x: (..., in), the compute dtype; W^ is built in it.
        base: the frozen base as `encode_base` stores it, (out, words), an integer dtype.
        scale: fp32 (rows, groups), snapped, weight units per grid step. Differentiable.
        zero_point: int8 (rows, groups), grid steps, or None.
        A, B: (R, in) and (out, R), grid steps, any float dtype, or both None. Differentiable.
        bias: (out,), x's dtype, or None. Differentiable.
        bits, downcast: how `base` is stored.

    Returns:
        (..., out) in x's dtype. For backward it keeps x, the stored base, the small tensors, and y where a scale is
        trained that belongs to a whole row; W^ is rebuilt.
    """
    return _linear(x, base, scale, zero_point, A, B, bias, bits, downcast)
