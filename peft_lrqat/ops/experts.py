"""The experts of a mixture: what `linear.py` does for one weight, for a stack of E of them.

transformers keeps experts as 3-D parameters (E, out, in). Here the stack is a 2-D weight of E out rows, stored as every
other: expert e owns rows e out to (e + 1) out of the base, the scales and the zero points. Only A and B tell that there
are several: they lie as in PEFT's `ParamWrapper`,

    lora_A (E r, in)   = (E, r, in)        lora_B (out, r E) = (out, r, E)

and expert e has A[e] and B[:, :, e]. Each expert is rounded as a linear layer with its tensors is, bit for bit.

There are two operations. `expert_weights` builds the W^ of some experts, for whoever multiplies with them. The weights
of one layer of a large mixture are a gigabyte, and so are their gradients; `expert_linear` multiplies itself, and has
neither as a whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference_experts
from .dispatch import kernels_for, no_autocast, refuse_second_derivatives
from .staging import staged
from .stored_base import BaseFormat

_NAMESPACE = "peft_lrqat"


def _weights_impl(
    base: Tensor,
    scale0: Tensor,
    shift: Tensor | None,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    experts: Tensor | None,
    num_experts: int,
    c: float,
    bits: int,
    downcast: str,
    scale_dtype: str,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    fmt = BaseFormat(bits, in_features, downcast)
    with (
        staged(base, scale0, zero_point, _one_of(experts, A, shift)) as (base, scale0, zero_point),
        no_autocast(base),
    ):
        stack = (base, scale0, shift, zero_point, A, B)
        implementation = kernels_for(base) or reference_experts
        return implementation.expert_weights(*stack, experts, num_experts, c, fmt, scale_dtype, dtype)


def _weights_backward_impl(
    grad: Tensor,
    base: Tensor,
    scale0: Tensor,
    shift: Tensor | None,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    experts: Tensor | None,
    num_experts: int,
    c: float,
    bits: int,
    downcast: str,
    scale_dtype: str,
    need_shift: bool,
    need_AB: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    fmt = BaseFormat(bits, grad.shape[-1], downcast)
    needs, implementation = (need_shift, need_AB), kernels_for(grad) or reference_experts
    with staged(base, scale0, zero_point, grad) as (base, scale0, zero_point), no_autocast(grad):
        stack = (base, scale0, shift, zero_point, A, B)
        grads = implementation.expert_weights_backward(grad, *stack, experts, num_experts, c, fmt, scale_dtype, *needs)
    return _filled(grads, grad)


def _one_of(*tensors: Tensor | None) -> Tensor | None:
    """Return the first that there is: of some, all on the device on which is worked, where a base may be elsewhere."""
    return next((tensor for tensor in tensors if tensor is not None), None)


def _filled(grads: Any, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the weight's side: an op cannot return None, so what was not asked for is empty."""
    dshift, dA, dB = (near.new_empty(0, dtype=torch.float32) if g is None else g for g in grads[1:])
    return dshift, dA, dB


_weights_op = torch.library.custom_op(f"{_NAMESPACE}::expert_weights", _weights_impl, mutates_args=())
_weights_backward_op = torch.library.custom_op(
    f"{_NAMESPACE}::expert_weights_backward", _weights_backward_impl, mutates_args=()
)


@_weights_op.register_fake
def _(base, scale0, shift, zero_point, A, B, experts, num_experts, c, bits, downcast, scale_dtype, in_features, dtype):
    listed = num_experts if experts is None else experts.shape[0]
    near = _one_of(A, shift, scale0)
    assert near is not None
    return near.new_empty((listed, base.shape[0] // num_experts, in_features), dtype=dtype)


@_weights_backward_op.register_fake
def _(
    grad, base, scale0, shift, zero_point, A, B, experts, num_experts, c, bits, downcast, scale_dtype, need_shift,
    need_AB,
):  # fmt: skip
    return _fake_gradients(grad, shift, A, B, need_shift, need_AB)


def _fake_gradients(
    near: Tensor, shift: Tensor | None, A: Tensor | None, B: Tensor | None, need_shift: bool, need_AB: bool
) -> tuple[Tensor, ...]:
    needed = ((need_shift, shift), (need_AB, A), (need_AB, B))
    return tuple(
        near.new_empty(tensor.shape if need and tensor is not None else 0, dtype=torch.float32)
        for need, tensor in needed
    )


def _weights_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.num_experts, ctx.c, ctx.bits, ctx.downcast, ctx.scale_dtype, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _weights_backward(ctx: Any, grad: Tensor) -> tuple:
    refuse_second_derivatives()
    tensors = ctx.saved_tensors
    _, _, shift, _, A, B, _ = tensors
    needs = _needs(ctx.needs_input_grad, A)
    constants = (ctx.num_experts, ctx.c, ctx.bits, ctx.downcast, ctx.scale_dtype)
    found = _weights_backward_op(grad, *tensors, *constants, *needs)
    dshift, dA, dB = _cast(found, (shift, A, B), needs)
    return None, None, dshift, None, dA, dB, *(None,) * 8


def _needs(asked: tuple[bool, ...], A: Tensor | None) -> tuple[bool, bool]:
    """Tell whether gradients of the shift, and of A and B, are wanted: of an op that begins with base, scale0, shift,
    zero_point, A, B."""
    return asked[2], A is not None and (asked[4] or asked[5])


def _cast(found: tuple[Tensor, ...], tensors: tuple[Tensor | None, ...], needs: tuple[bool, bool]) -> tuple:
    """Return the gradients of shift, A and B in their dtypes, None where not needed."""
    return tuple(
        g.to(tensor.dtype) if need and tensor is not None else None
        for g, tensor, need in zip(found, tensors, (needs[0], needs[1], needs[1]), strict=True)
    )


_weights_op.register_autograd(_weights_backward, setup_context=_weights_setup)


# -- the product


def _linear_impl(
    x: Tensor,
    ends: Tensor,
    base: Tensor,
    scale0: Tensor,
    shift: Tensor | None,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    c: float,
    bits: int,
    downcast: str,
    scale_dtype: str,
) -> Tensor:
    fmt = BaseFormat(bits, x.shape[1], downcast)
    implementation = kernels_for(x) or reference_experts
    with staged(base, scale0, zero_point, x) as (base, scale0, zero_point), no_autocast(x):
        return implementation.expert_linear(x, ends, base, scale0, shift, zero_point, A, B, c, fmt, scale_dtype)


def _linear_backward_impl(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    ends: Tensor,
    base: Tensor,
    scale0: Tensor,
    shift: Tensor | None,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    c: float,
    bits: int,
    downcast: str,
    scale_dtype: str,
    need_x: bool,
    need_shift: bool,
    need_AB: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fmt = BaseFormat(bits, x.shape[1], downcast)
    needs, implementation = (need_x, need_shift, need_AB), kernels_for(x) or reference_experts
    with staged(base, scale0, zero_point, x) as (base, scale0, zero_point), no_autocast(x):
        stack = (base, scale0, shift, zero_point, A, B)
        grads = implementation.expert_linear_backward(dy, x, y, ends, *stack, c, fmt, scale_dtype, *needs)
    return x.new_empty(0) if grads.x is None else grads.x, *_filled(grads, x)


_linear_op = torch.library.custom_op(f"{_NAMESPACE}::expert_linear", _linear_impl, mutates_args=())
_linear_backward_op = torch.library.custom_op(
    f"{_NAMESPACE}::expert_linear_backward", _linear_backward_impl, mutates_args=()
)


@_linear_op.register_fake
def _(x, ends, base, scale0, shift, zero_point, A, B, c, bits, downcast, scale_dtype):
    return x.new_empty(x.shape[0], base.shape[0] // ends.shape[0])


@_linear_backward_op.register_fake
def _(
    dy, x, y, ends, base, scale0, shift, zero_point, A, B, c, bits, downcast, scale_dtype, need_x, need_shift, need_AB
):  # fmt: skip
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    return dx, *_fake_gradients(dy, shift, A, B, need_shift, need_AB)


def _linear_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ends, *stack, ctx.c, ctx.bits, ctx.downcast, ctx.scale_dtype = inputs
    _, scale0, shift, *_ = stack
    need_shift, need_AB = _needs(ctx.needs_input_grad[2:], stack[4])
    keeps = (kernels_for(x) or reference_experts).experts_keep_output(scale0, shift, ctx.bits)
    # without gradients of the weight's side, X itself is not needed: only its shape and dtype, for dX
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.save_for_backward(x if need_shift or need_AB else None, output if need_shift and keeps else None, ends, *stack)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple:
    refuse_second_derivatives()
    x, y, ends, *stack = ctx.saved_tensors
    _, _, shift, _, A, B = stack
    if x is None:
        x = torch.empty((), dtype=ctx.x_dtype, device=dy.device).expand(ctx.x_shape)
    need_x, needs = ctx.needs_input_grad[0], _needs(ctx.needs_input_grad[2:], A)
    constants = (ctx.c, ctx.bits, ctx.downcast, ctx.scale_dtype)
    dx, *found = _linear_backward_op(dy, x, y, ends, *stack, *constants, need_x, *needs)
    dshift, dA, dB = _cast(tuple(found), (shift, A, B), needs)
    return dx if need_x else None, None, None, None, dshift, None, dA, dB, *(None,) * 4


_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)


def expert_linear(
    x: Tensor,
    ends: Tensor,
    base: Tensor,
    scale0: Tensor,
    shift: Tensor | None,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    c: float,
    bits: int,
    downcast: str,
    scale_dtype: str,
) -> Tensor:
    """Compute y = x W^T, where each expert's W^ multiplies its own tokens: `torch.nn.functional.grouped_mm` with
    `expert_weights`, which exist (and so does their gradient) for a few experts at a time, and only where tokens are.

    Args:
        x: (T, in), tokens in the order of their experts, the compute dtype; W^ is built in it. Differentiable.
        ends: int32 or int64 (E,), where the tokens of each expert end.
        base to scale_dtype: as for `expert_weights`.

    Returns:
        (T, out) in x's dtype. What lies behind the last end belongs to no expert and is not defined, and neither is its
        gradient. For backward it keeps x, the stored base, the small tensors, and y on a CPU where one entry of the
        shift belongs to a whole row.
    """
    return _linear_op(x, ends, base, scale0, shift, zero_point, A, B, c, bits, downcast, scale_dtype)


def expert_weights(
    base: Tensor,
    scale0: Tensor,
    shift: Tensor | None,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    experts: Tensor | None,
    num_experts: int,
    c: float,
    bits: int,
    downcast: str,
    scale_dtype: str,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Build W^ of some experts, each as `quantized_linear` builds it, with the same gradients for shift, A and B.

    Args:
        base: the frozen base as `encode_base` stores it, (E out, words), an integer dtype.
        scale0: fp32 (E out, groups), weight units per grid step; (1, groups): for all rows of all experts.
        shift: the same shape, or (E out, 1) for all groups of a row (see `quantized_linear`), any float dtype, or None.
            Differentiable.
        zero_point: int8, scale0's shape, grid steps, or None.
        A, B: (E r, in) and (out, r E), grid steps, any float dtype, laid out as above; or both None. Differentiable.
        experts: int64 (n,), which; None: all. One that is listed twice gets both gradients.
        num_experts: E.
        c: lora_alpha / r.
        bits, downcast: how `base` is stored.
        scale_dtype: what s is snapped to, see `grid.snap_scale`.
        in_features: of an expert.
        dtype: of the result.

    Returns:
        (n, out, in). For backward it keeps the stored base and the small tensors; gradients of experts that are not
        listed are 0.
    """
    tensors = (base, scale0, shift, zero_point, A, B, experts)
    return _weights_op(*tensors, num_experts, c, bits, downcast, scale_dtype, in_features, dtype)
