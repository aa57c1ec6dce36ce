"""The operations that a layer calls: which code runs them, and how autograd, checkpointing and torch.compile see them.

Each operation is a `torch.library` op (schema, fake implementation, autograd), so `torch.compile` sees one opaque node
with known shapes and no graph break. Outside of a compiled region the same functions are called through an ordinary
`autograd.Function`, whose dispatch costs a fifth: on a GPU, small batches wait for Python.

On a GPU with Triton the work is done by `kernels/`, elsewhere by `reference.py`; both give the same codes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .dispatch import cast, kernels_for, no_autocast, refuse_second_derivatives, refuse_transforms
from .staging import staged, versions
from .static_inputs import LearnedScale, rounding_gradients
from .stored_base import BaseFormat

_NAMESPACE = "peft_lrqat"


# -- the scale


def _scale_backward(ctx: Any, grad: Tensor):
    (scale0,) = ctx.saved_tensors
    return None, (grad * scale0).sum_to_size(ctx.shift_shape).to(ctx.shift_dtype), None


def _scale_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.shift_dtype, ctx.shift_shape = inputs[1].dtype, inputs[1].shape
    ctx.save_for_backward(inputs[0])


@torch.library.custom_op(f"{_NAMESPACE}::trained_scale", mutates_args=())
def _scale_op(scale0: Tensor, shift: Tensor, scale_dtype: str) -> Tensor:
    return reference.snapped_scale(scale0, shift, scale_dtype)


_scale_op.register_fake(lambda scale0, shift, scale_dtype: torch.empty_like(scale0))
_scale_op.register_autograd(_scale_backward, setup_context=_scale_setup)


def trained_scale(scale0: Tensor, shift: Tensor | None, scale_dtype: str) -> Tensor:
    """Compute s = snap(s0 (1 + shift)), with a straight-through gradient: the master moves freely, the forward sees
    what is stored.

    Args:
        scale0: fp32 (rows, groups), weight units per grid step.
        shift: the same shape, or (rows, 1) for all groups of a row, any float dtype: the relative change; None: the
            scale is s0. Differentiable.
        scale_dtype: see `grid.snap_scale`.

    Returns:
        fp32 (rows, groups).
    """
    return scale0 if shift is None else _scale_op(scale0, shift, scale_dtype)


# -- the linear layer


def _linear_impl(
    x: Tensor,
    base: Tensor,
    scale0: Tensor,
    shift: Tensor | None,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    c: float,
    bits: int,
    downcast: str,
    scale_dtype: str,
) -> Tensor:
    dtype, fmt = x.dtype, BaseFormat(bits, x.shape[-1], downcast)
    # what the reference multiplies in fp32, to build W^, it keeps from autocast itself
    with staged(base, scale0, zero_point, x) as (base, scale0, zero_point), no_autocast(x, dtype):
        build = (kernels_for(x) or reference).linear_weight
        weight = build(base, scale0, shift, zero_point, A, B, c, fmt, scale_dtype, dtype)
        return torch.nn.functional.linear(x, weight, bias)


def linear_weight(
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
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Build the W^ that `quantized_linear` multiplies an input of this dtype with: (out, in), without gradient.

    See there for the other arguments.
    """
    fmt = BaseFormat(bits, in_features, downcast)
    with staged(base, scale0, zero_point) as (base, scale0, zero_point), no_autocast(base):
        implementation = kernels_for(base) or reference
        return implementation.linear_weight(base, scale0, shift, zero_point, A, B, c, fmt, scale_dtype, dtype)


def _linear_backward_impl(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
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
    fmt = BaseFormat(bits, x.shape[-1], downcast)
    flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    flat_y = None if y is None else y.reshape(-1, y.shape[-1])
    needs = (need_x, need_shift, need_AB)
    implementation = kernels_for(dy) or reference
    with staged(base, scale0, zero_point, dy) as (base, scale0, zero_point), no_autocast(dy):
        weight = (base, scale0, shift, zero_point, A, B)
        grads = implementation.linear_backward(flat_dy, flat_x, flat_y, *weight, c, fmt, scale_dtype, *needs)
    dx = x.new_empty(0) if grads.x is None else grads.x.view(x.shape)
    # an op cannot return None, so what was not asked for is empty
    dshift, dA, dB = (dy.new_empty(0, dtype=torch.float32) if g is None else g for g in grads[1:])
    return dx, dshift, dA, dB


_linear_op = torch.library.custom_op(f"{_NAMESPACE}::quantized_linear", _linear_impl, mutates_args=())
_linear_backward_op = torch.library.custom_op(
    f"{_NAMESPACE}::quantized_linear_backward", _linear_backward_impl, mutates_args=()
)


@_linear_op.register_fake
def _(x, base, scale0, shift, zero_point, A, B, bias, c, bits, downcast, scale_dtype):
    return x.new_empty(*x.shape[:-1], base.shape[0])


@_linear_backward_op.register_fake
def _(dy, x, y, base, scale0, shift, zero_point, A, B, c, bits, downcast, scale_dtype, need_x, need_shift, need_AB):
    needed = ((need_shift, shift), (need_AB, A), (need_AB, B))
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0),
        *(dy.new_empty(t.shape if need and t is not None else 0, dtype=torch.float32) for need, t in needed),
    )


class _Needs(NamedTuple):
    """Of what gradients are wanted."""

    x: bool
    shift: bool
    A: bool
    B: bool
    bias: bool


def _note(ctx: Any, inputs: tuple, output: Tensor, needs: _Needs) -> tuple[Tensor | None, Tensor | None, tuple]:
    """Put what is no tensor into ctx, and return x and y as far as backward wants them, and the weight's side."""
    x, base, scale0, shift, zero_point, A, B, bias, *ctx.constants = inputs
    ctx.needs = needs
    # Y spares the scale gradient the product dY^T X where a scale belongs to a whole row. With a bias, Y - bias would
    # cancel in low precision, so there the product is made.
    keep_y = needs.shift and bias is None and (kernels_for(x) or reference).keeps_output(scale0, shift, inputs[9])
    # without gradients of the weight's side, X itself is not needed: only its shape and dtype, for dX
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    x = x if needs.shift or needs.A or needs.B else None
    return x, output if keep_y else None, (base, scale0, shift, zero_point, A, B)


def _gradients(ctx: Any, dy: Tensor, backward: Any, x: Tensor | None, y: Tensor | None, weight: tuple) -> tuple:
    """Compute the gradients of x, shift, A, B and bias; `backward` is the op, or the function that it registers."""
    needs: _Needs = ctx.needs
    _, _, shift, _, A, B = weight
    need_AB = A is not None and (needs.A or needs.B)
    if x is None:
        x = torch.empty((), dtype=ctx.x_dtype, device=dy.device).expand(ctx.x_shape)
    dx, dshift, dA, dB = backward(dy, x, y, *weight, *ctx.constants, needs.x, needs.shift, need_AB)
    return (
        dx if needs.x else None,
        cast(dshift, shift.dtype) if needs.shift else None,
        cast(dA, A.dtype) if need_AB else None,
        cast(dB, B.dtype) if need_AB else None,
        dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype) if needs.bias else None,
    )


def _op_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    need = ctx.needs_input_grad
    x, y, weight = _note(ctx, inputs, output, _Needs(need[0], need[3], need[5], need[6], need[7]))
    ctx.save_for_backward(x, y, *weight)


def _op_backward(ctx: Any, dy: Tensor) -> tuple:
    x, y, *weight = ctx.saved_tensors
    dx, dshift, dA, dB, dbias = _gradients(ctx, dy, _linear_backward_op, x, y, tuple(weight))
    return dx, None, None, dshift, None, dA, dB, dbias, None, None, None, None


_linear_op.register_autograd(_op_backward, setup_context=_op_setup)


class _Others(NamedTuple):
    """The arguments of `_Linear` that have no gradient."""

    stored: tuple[Tensor, Tensor, Tensor | None]  # base, scale0, zero_point
    constants: tuple[float, int, str, str]
    values: Tensor | None
    how: list[Any]  # of `LearnedScale`, all but log2


class _Linear(torch.autograd.Function):
    # torch looks at every argument in Python, so what has no gradient comes as one; with `setup_context`, it would
    # inspect the signature in every call
    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        shift: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        bias: Tensor | None,
        log2: Tensor | None,
        others: _Others,
    ) -> Tensor:
        (base, scale0, zero_point), constants, values, ctx.how = others
        inputs = (given if values is None else values, base, scale0, shift, zero_point, A, B, bias, *constants)
        output = _linear_impl(*inputs)
        need_x, *need, ctx.need_log2, _ = ctx.needs_input_grad
        x, y, weight = _note(ctx, inputs, output, _Needs(need_x or ctx.need_log2, *need))
        rounds = log2 is not None and (need_x or ctx.need_log2)
        weight = (*weight, log2)
        # Gradient checkpointing runs two Python hooks for every saved tensor. What lives as long as the layer itself
        # (parameters, and views of them) is not its business; anything else is saved as it should be.
        own = all(t is None or t.is_leaf for t in weight)
        ctx.weight, ctx.versions = (weight, versions(weight)) if own else (None, None)
        ctx.save_for_backward(x, y, given if rounds else None, *(() if own else weight))
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        refuse_second_derivatives()
        try:
            x, y, given, *weight = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise RuntimeError(
                "The input or the output of a quantized layer was changed in place after its forward (Falcon does so), "
                "but the gradient of scales that are trained by row needs the output, and that of a learned scale of "
                "inputs the input. Train one scale a group (`group_size=128`, `learn_scales=True`) or with "
                "`learn_scales=False`, and with `act_scale='dynamic'`."
            ) from error
        if ctx.weight is not None and ctx.versions != versions(ctx.weight):
            raise RuntimeError(
                "An adapter or a scale was changed in place between forward and backward (an optimizer step, a load, a "
                "merge). Run forward again."
            )
        *weight, log2 = ctx.weight or weight
        dx, *grads = _gradients(ctx, dy, _linear_backward_impl, x, y, tuple(weight))
        dlog2 = None
        if given is not None:
            learned = LearnedScale(log2, *ctx.how)
            dx, dlog2 = rounding_gradients(dx, given, learned, ctx.needs_input_grad[0], ctx.need_log2)
        return dx, *grads, dlog2, None


def quantized_linear(
    x: Tensor,
    base: Tensor,
    scale0: Tensor,
    shift: Tensor | None,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    c: float,
    bits: int,
    downcast: str,
    scale_dtype: str,
    values: Tensor | None = None,
    learned: LearnedScale | None = None,
) -> Tensor:
    """Compute y = x W^T + bias with W^ = s * (clip(round(Phi + c B A)) - z) and s = snap(s0 (1 + shift)) (LR-QAT, arXiv
    2406.06385, eq. 8).

    Args:
        x: (..., in), the compute dtype; W^ is built in it.
        base: the frozen base as `encode_base` stores it, (out, words), an integer dtype.
        scale0: fp32 (rows, groups), weight units per grid step.
        shift: (rows, groups), any float dtype: the relative change of the scales; None: s is s0. Differentiable. Or
            (rows, 1): one change for all groups g of a row j. A and B then count steps of t_j = max_g |s0_jg|, so that
            Z = Phi + (t_j / s0_jg) c B A, and their gradient is LoRA's.
        zero_point: int8 (rows, groups), grid steps, or None.
        A, B: (R, in) and (out, R), grid steps (but see `shift`), any float dtype, or both None. Differentiable;
            `factors.py` says how their product is rounded.
        bias: (out,), x's dtype, or None. Differentiable.
        c: lora_alpha / r.
        bits, downcast: how `base` is stored.
        scale_dtype: what s is snapped to, see `grid.snap_scale`.
        values: of x's shape, in the compute dtype, without a graph: what x was rounded to. They are multiplied in its
            place, and the gradient passes straight through to x, whose dtype may be another. None: x itself; so it must
            be in a compiled region.
        learned: the fixed scale that made `values`, which receives a gradient, and none of what it cut passes to x.
            None: the gradient passes straight through all values.

    Returns:
        (..., out) in the compute dtype. For backward it keeps x (or `values`), the stored base, the small tensors, and
        y where one entry of the shift belongs to a whole row; W^ is rebuilt.
    """
    constants = (c, bits, downcast, scale_dtype)
    if torch.compiler.is_compiling():
        return _linear_op(x, base, scale0, shift, zero_point, A, B, bias, *constants)
    refuse_transforms()
    log2, *how = (None,) if learned is None else learned
    return _Linear.apply(x, shift, A, B, bias, log2, _Others((base, scale0, zero_point), constants, values, how))
