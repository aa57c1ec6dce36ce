"""The linear layer over packed, *trainable* codes: y = x W^T, with a gradient for W itself.

Two differences from `quantized_linear`: the gradient of the whole weight is returned, because it is what the optimizer
rounds from; and the weight may go through a ternary projection on its way (`ternary_scale`). The gradient is taken at
the weight that the forward used; no straight-through estimator is involved, except through the projection.

W^ and the gradient of a learned scale come from `kernels/` where those run, from `reference.py` elsewhere, W^ equal bit
for bit. `mean_code`, which a projection needs once a forward, stays with torch: it is a sum of integers, and costs less
than a product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..chunks import row_chunks
from ..grid import grouped
from ..packing import unpack
from . import reference
from .dispatch import kernels_for, no_autocast, refuse_second_derivatives
from .reference import low_bit_levels
from .static_inputs import LearnedScale, rounding_gradients

__all__ = ["low_bit_levels", "low_bit_linear", "low_bit_weight", "mean_code"]

_NAMESPACE = "peft_lrqat"


@torch.library.custom_op(f"{_NAMESPACE}::mean_code", mutates_args=())
def mean_code(packed: Tensor, rows: int, groups: int, bits: int, in_features: int) -> Tensor:
    """Average |q| over the weights that share a scale, at least half a code: fp32 (rows, groups).

    A sum of integers, so equal on every device and in every order.

    Args:
        packed: int32 (out, words), codes of `bits` bits.
        rows, groups: the scales' shape; rows is out, or 1 where all rows share.
    """
    sums = torch.empty(packed.shape[0], groups, dtype=torch.int64, device=packed.device)
    for part in row_chunks(packed.shape[0], in_features, packed.device):
        codes = unpack(packed[part], bits, in_features).to(torch.int32)
        sums[part] = codes.abs_().view(codes.shape[0], groups, -1).sum(dim=-1)
    if rows == 1:
        sums = sums.sum(dim=0, keepdim=True)
    count = packed.shape[0] * in_features // (rows * groups)
    # all-zero codes stay zero with any positive scale
    return (sums.double() / count).clamp_(min=0.5 / count).float()


@mean_code.register_fake
def _(packed, rows, groups, bits, in_features):
    return packed.new_empty(rows, groups, dtype=torch.float32)


def _linear_impl(
    x: Tensor, packed: Tensor, scale: Tensor, ternary_scale: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    with no_autocast(x, x.dtype):
        implementation = kernels_for(packed) or reference
        weight = implementation.low_bit_weight(packed, scale, ternary_scale, bits, x.shape[-1], x.dtype)
        return torch.nn.functional.linear(x, weight, bias)


def low_bit_weight(
    packed: Tensor, scale: Tensor, ternary_scale: Tensor | None, bits: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Build the W^ that `low_bit_linear` multiplies an input of this dtype with: (out, in), without gradient.

    See there for the other arguments.
    """
    with no_autocast(packed):
        implementation = kernels_for(packed) or reference
        return implementation.low_bit_weight(packed, scale, ternary_scale, bits, in_features, dtype)


# as in `linear.py`: ops for torch.compile, the same functions in eager mode, whose dispatch costs less
_linear_op = torch.library.custom_op(f"{_NAMESPACE}::low_bit_linear", _linear_impl, mutates_args=())


@_linear_op.register_fake
def _(x, packed, scale, ternary_scale, bias, bits):
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _linear_backward_impl(
    dy: Tensor,
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    ternary_scale: Tensor | None,
    bits: int,
    need_x: bool,
    need_weight: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    in_features = x.shape[-1]
    flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, in_features)
    dx, dw, ds = x.new_empty(0), scale.new_empty(0), scale.new_empty(0)
    implementation = kernels_for(packed) or reference
    with no_autocast(dy, dy.dtype):
        if need_x:
            weight = implementation.low_bit_weight(packed, scale, ternary_scale, bits, in_features, dy.dtype)
            dx = (flat_dy @ weight).view(x.shape)
            del weight
        if need_weight or need_scale:
            dw = (flat_dy.t() @ flat_x).float()
        if need_scale:
            ds = implementation.scale_gradient(dw, packed, scale, ternary_scale, bits)
    return dx, dw if need_weight else scale.new_empty(0), ds


_linear_backward_op = torch.library.custom_op(
    f"{_NAMESPACE}::low_bit_linear_backward", _linear_backward_impl, mutates_args=()
)


@_linear_backward_op.register_fake
def _(dy, x, packed, scale, ternary_scale, bits, need_x, need_weight, need_scale):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0),
        scale.new_empty((packed.shape[0], x.shape[-1]) if need_weight else 0),
        torch.empty_like(scale) if need_scale else scale.new_empty(0),
    )


#: Which argument of `_LowBitLinear` is log2 of the fixed scale of inputs.
_LOG2 = 10


class _LowBitLinear(torch.autograd.Function):
    """Ties the two ops to the parameter: `weight` has no float storage, and receives a gradient of its full size."""

    @staticmethod
    def forward(ctx, x, weight, learned, bias, packed, scale, ternary_scale, factor, bits, values, log2, how):
        rounds = log2 is not None and (ctx.needs_input_grad[0] or ctx.needs_input_grad[_LOG2])
        given, x = x if rounds else None, x if values is None else values
        ctx.how = how
        ctx.bits, ctx.x_shape, ctx.x_dtype = bits, x.shape, x.dtype
        needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if needs_x else None, packed, scale, ternary_scale, factor, given, log2)
        run = _linear_op if torch.compiler.is_compiling() else _linear_impl
        return run(x, packed, scale, ternary_scale, bias, bits)

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivatives()
        x, packed, scale, ternary_scale, factor, given, log2 = ctx.saved_tensors
        need_x, need_weight, need_scale, need_bias = ctx.needs_input_grad[:4]
        need_log2 = ctx.needs_input_grad[_LOG2]
        if x is None:
            x = torch.empty((), dtype=ctx.x_dtype, device=dy.device).expand(ctx.x_shape)
        run = _linear_backward_op if torch.compiler.is_compiling() else _linear_backward_impl
        needs = (need_x or need_log2, need_weight, need_scale)
        dx, dw, ds = run(dy.contiguous(), x, packed, scale, ternary_scale, ctx.bits, *needs)
        dlog2 = None
        if given is not None:
            dx, dlog2 = rounding_gradients(dx, given, LearnedScale(log2, *ctx.how), need_x, need_log2)
        if need_weight and factor is not None:
            dw = (grouped(dw, factor) * factor.unsqueeze(-1)).view_as(dw)
        db = dy.reshape(-1, dy.shape[-1]).sum(0) if need_bias else None
        own = dx if need_x else None, dw if need_weight else None, ds if need_scale else None, db
        return *own, *(None,) * 6, dlog2, None


def low_bit_linear(
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    scale: Tensor,
    ternary_scale: Tensor | None,
    factor: Tensor | None,
    bias: Tensor | None,
    bits: int,
    values: Tensor | None = None,
    learned: LearnedScale | None = None,
) -> Tensor:
    """Compute y = x W^T + bias with W^ = s * q, or its ternary projection t_s * clip(round(s * q / t_s), -1, 1).

    Args:
        x: (..., in), the compute dtype; W^ is built in it. Differentiable.
        weight: fp32 (out, in), the parameter that receives the gradient; its values are not read.
        packed: int32 (out, words), its codes.
        scale: fp32 (rows, groups), snapped, weight units per grid step. Differentiable, unless `ternary_scale` is
            given, which is differentiable then.
        ternary_scale: fp32 (rows, groups) or None.
        factor: fp32 (rows, groups) or None: what dL/dW^ is multiplied with to become the parameter's gradient.
        bias: (out,), x's dtype, or None. Differentiable.
        bits: width of a packed code.
        values, learned: what x was rounded to, and by which fixed scale: see `quantized_linear`.

    Returns:
        (..., out) in x's dtype. For backward it keeps x, the packed codes and the scales; W^ is rebuilt.
    """
    trained = scale if ternary_scale is None else ternary_scale
    detached = None if ternary_scale is None else ternary_scale.detach()
    log2, *how = (None,) if learned is None else learned
    constants = (packed, scale.detach(), detached, factor, bits, values)
    return _LowBitLinear.apply(x, weight, trained, bias, *constants, log2, how)
