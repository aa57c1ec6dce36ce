"""The linear layer over packed, *trainable* codes: y = x W^T, with a gradient for W itself.

Two differences from `quantized_linear`: the gradient of the whole weight is returned, because it is what the optimizer
rounds from; and the weight may go through a ternary projection on its way (`ternary_scale`). The gradient is taken at
the weight that the forward used; no straight-through estimator is involved, except through the projection.

W^ and the gradient of a learned scale come from `kernels/` where those run, from `reference.py` elsewhere, W^ equal bit
for bit. `mean_code`, which a projection needs once a forward, stays with torch: it is a sum of integers, and costs less
than a product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chunks import row_chunks
from ..grid import grouped
from ..packing import unpack
from . import reference
from .dispatch import kernels_for, no_autocast, refuse_second_derivatives, refuse_transforms
from .narrow_gradient import NarrowGradient
from .reference import low_bit_levels
from .staging import versions
from .static_inputs import LearnedScale, rounding_gradients

__all__ = ["low_bit_levels", "low_bit_linear", "low_bit_weight", "mean_code"]

_NAMESPACE = "peft_lrqat"

#: From how many tokens on a product is made after its function has returned (`low_bit_linear`). With fewer of them, a
#: step waits for Python, of which that takes some microseconds more.
_LATE_TOKENS = 2048


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


def _linear_into(
    out: Tensor, x: Tensor, packed: Tensor, scale: Tensor, ternary_scale: Tensor | None, bias: Tensor | None, bits: int
) -> None:
    """Write what `_linear_impl` returns to a contiguous tensor, without a graph."""
    with no_autocast(x, x.dtype):
        implementation = kernels_for(packed) or reference
        weight = implementation.low_bit_weight(packed, scale, ternary_scale, bits, x.shape[-1], x.dtype)
        x, out = x.detach(), out.detach()
        if x.dim() not in (2, 3) or not x.is_contiguous():
            out.copy_(torch.nn.functional.linear(x, weight, None if bias is None else bias.detach()))
            return
        # the same product as that of `linear`
        flat, flat_out = x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        if bias is None:
            torch.mm(flat, weight.t(), out=flat_out)
        else:
            torch.addmm(bias.detach(), flat, weight.t(), out=flat_out)


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
    narrow: bool = False,
    place: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    in_features = x.shape[-1]
    flat_dy = dy.reshape(-1, dy.shape[-1])
    dx = dw = ds = None
    implementation = kernels_for(packed) or reference
    with no_autocast(dy, dy.dtype):
        if need_x:
            weight = implementation.low_bit_weight(packed, scale, ternary_scale, bits, in_features, dy.dtype)
            dx = torch.mm(flat_dy, weight).view(x.shape)
            del weight
        if need_weight or need_scale:
            dw = torch.mm(flat_dy.t(), x.reshape(-1, in_features), out=place)
            if need_scale or not narrow:
                dw = dw.float()
        if need_scale:
            ds = implementation.scale_gradient(dw, packed, scale, ternary_scale, bits)
    return dx, dw if need_weight else None, ds


@torch.library.custom_op(f"{_NAMESPACE}::low_bit_linear_backward", mutates_args=())
def _linear_backward_op(
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
    needs = need_x, need_weight, need_scale
    dx, dw, ds = _linear_backward_impl(dy, x, packed, scale, ternary_scale, bits, *needs)
    # an op returns tensors
    return (
        x.new_empty(0) if dx is None else dx,
        scale.new_empty(0) if dw is None else dw,
        scale.new_empty(0) if ds is None else ds,
    )


@_linear_backward_op.register_fake
def _(dy, x, packed, scale, ternary_scale, bits, need_x, need_weight, need_scale):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0),
        scale.new_empty((packed.shape[0], x.shape[-1]) if need_weight else 0),
        torch.empty_like(scale) if need_scale else scale.new_empty(0),
    )


class _Others(NamedTuple):
    """The arguments of `_LowBitLinear` that have no gradient."""

    stored: tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # packed, scale, ternary_scale, factor
    bits: int
    values: Tensor | None
    how: list[Any]  # of `LearnedScale`, all but log2
    narrow: bool
    late: bool
    places: list[Tensor]


class _LowBitLinear(torch.autograd.Function):
    """Ties the two ops to the parameter: `weight` has no float storage, and receives a gradient of its full size."""

    # as `_Linear` in `linear.py`: torch looks at every argument in Python, so what has no gradient comes as one
    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        weight: Tensor,
        learned: Tensor,
        bias: Tensor | None,
        log2: Tensor | None,
        others: _Others,
    ) -> Tensor:
        stored, ctx.bits, values, ctx.how, narrow, late, ctx.places = others
        packed, scale, ternary_scale, factor = stored
        x = given if values is None else values
        need_x, need_weight, need_learned, _, need_log2, _ = ctx.needs_input_grad
        ctx.narrow = narrow and factor is None and not torch.compiler.is_compiling()
        rounds = log2 is not None and (need_x or need_log2)
        kept = (*stored, log2)
        compiling = torch.compiler.is_compiling()
        # Gradient checkpointing runs two Python hooks for every saved tensor. Codes, and scales that are the weight's
        # own, live as long as the layer itself, and are not its business; scales that a forward made are.
        own = ternary_scale is None and factor is None and not compiling
        ctx.kept, ctx.versions = (kept, versions(kept)) if own else (None, None)
        needs_values = need_weight or need_learned
        if not needs_values:
            ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.save_for_backward(x if needs_values else None, given if rounds else None, *(() if own else kept))
        if late:
            return x.new_empty(*x.shape[:-1], packed.shape[0])
        run = _linear_op if compiling else _linear_impl
        return run(x, packed, scale, ternary_scale, bias, ctx.bits)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        refuse_second_derivatives()
        x, given, *kept = ctx.saved_tensors
        if ctx.kept is not None and ctx.versions != versions(ctx.kept):
            raise RuntimeError(
                "The codes or the scales of a low-bit weight were changed in place between forward and backward (an "
                "optimizer step, a load, a merge). Run forward again."
            )
        packed, scale, ternary_scale, factor, log2 = ctx.kept or kept
        need_x, need_weight, need_learned, need_bias, need_log2, _ = ctx.needs_input_grad
        if x is None:
            x = torch.empty((), dtype=ctx.x_dtype, device=dy.device).expand(ctx.x_shape)
        run: Any = _linear_backward_op if torch.compiler.is_compiling() else _linear_backward_impl
        how: tuple = need_x or need_log2, need_weight, need_learned
        if ctx.narrow:
            fits = need_weight and ctx.places and ctx.places[-1].dtype == dy.dtype
            how = (*how, True, ctx.places.pop() if fits else None)
        dx, dw, ds = run(dy.contiguous(), x, packed, scale, ternary_scale, ctx.bits, *how)
        dlog2 = None
        if given is not None:
            dx, dlog2 = rounding_gradients(dx, given, LearnedScale(log2, *ctx.how), need_x, need_log2)
        if need_weight and dw.dtype != torch.float32:
            dw = NarrowGradient(dw)
        elif need_weight and factor is not None:
            dw = (grouped(dw, factor) * factor.unsqueeze(-1)).view_as(dw)
        db = dy.reshape(-1, dy.shape[-1]).sum(0) if need_bias else None
        own = dx if need_x else None, dw if need_weight else None, ds if need_learned else None, db
        return *own, dlog2, None


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
    narrow: bool = False,
    places: list[Tensor] | None = None,
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
        narrow: whether the gradient of `weight` may be a `NarrowGradient`.
        places: (out, in) each, to which a gradient may be written where it may be narrow: each is taken from the list
            by one product in backward, if it has its dtype.

    Returns:
        (..., out) in x's dtype. For backward it keeps x, the packed codes and the scales; W^ is rebuilt.
    """
    refuse_transforms()
    trained = scale if ternary_scale is None else ternary_scale
    if scale.requires_grad:
        scale = scale.detach()
    if ternary_scale is not None:
        ternary_scale = ternary_scale.detach()
    log2, *how = (None,) if learned is None else learned
    inputs = x if values is None else values
    # Gradient checkpointing computes a block again until autograd has all that it keeps of it, which it has when the
    # function returns. If the product is made afterwards, that of the block's last layer is not made in vain.
    late = not torch.compiler.is_compiling() and inputs.numel() >= _LATE_TOKENS * inputs.shape[-1]
    others = _Others((packed, scale, ternary_scale, factor), bits, values, how, narrow, late, places or [])
    out = _LowBitLinear.apply(x, weight, trained, bias, log2, others)
    if late:
        _linear_into(out, inputs, packed, scale, ternary_scale, bias, bits)
    return out
