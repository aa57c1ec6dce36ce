"""The references of the operations on a stack of experts (`experts.py`): every expert is a linear layer of its own.

So each is given to the reference of the dense layer (`reference.py`), one after the other, and gets its numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..grid import rows_of
from . import reference
from .stored_base import BaseFormat


class Stack(NamedTuple):
    """The weight's side of a stack: what `quantized_linear` takes, of E experts (see `experts.expert_weights`)."""

    base: Tensor
    scale0: Tensor
    shift: Tensor | None
    zero_point: Tensor | None
    A: Tensor | None
    B: Tensor | None

    def expert(self, e: int, num_experts: int) -> Stack:
        """Select what is one expert's, as views: a linear layer's weight, with A (r, in) and B (out, r)."""
        out = self.base.shape[0] // num_experts
        rows = slice(e * out, (e + 1) * out)
        A = None if self.A is None else self.A.reshape(num_experts, -1, self.A.shape[1])[e]
        B = None if self.B is None else self.B.reshape(out, -1, num_experts)[..., e]
        shift, zero_point = rows_of(self.shift, rows), rows_of(self.zero_point, rows)
        return Stack(self.base[rows], rows_of(self.scale0, rows), shift, zero_point, A, B)


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
    fmt: BaseFormat,
    scale_dtype: str,
    dtype: torch.dtype,
) -> Tensor:
    """Build W^ of the experts listed: (n, out, in) in `dtype`. See `experts.expert_weights` for the arguments."""
    stack, listed = Stack(base, scale0, shift, zero_point, A, B), _listed(experts, num_experts)
    shape = len(listed), base.shape[0] // num_experts, fmt.in_features
    weights = torch.empty(shape, dtype=dtype, device=base.device)
    for place, e in enumerate(listed):
        weights[place] = reference.linear_weight(*stack.expert(e, num_experts), c, fmt, scale_dtype, dtype)
    return weights


def expert_weights_backward(
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
    fmt: BaseFormat,
    scale_dtype: str,
    need_shift: bool,
    need_AB: bool,
) -> reference.Gradients:
    """Compute the gradients of `expert_weights`: fp32, in the shapes of the whole stack, 0 where nothing is listed.

    Args:
        grad: (n, out, in), dL/dW^ of the experts listed.
        base to scale_dtype: as for `expert_weights`.
    """
    stack = Stack(base, scale0, shift, zero_point, A, B)
    total = zero_gradients(stack, need_shift, need_AB)
    for place, e in enumerate(_listed(experts, num_experts)):
        expert = stack.expert(e, num_experts)
        found = reference.weight_backward(grad[place], *expert, c, fmt, scale_dtype, need_shift, need_AB)
        add_expert(total, found, stack, e, num_experts)
    return total


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
    fmt: BaseFormat,
    scale_dtype: str,
) -> Tensor:
    """Compute y = x W^T, expert by expert: (T, out). See `experts.expert_linear` for the arguments."""
    stack, num_experts = Stack(base, scale0, shift, zero_point, A, B), ends.shape[0]
    y = x.new_empty(x.shape[0], base.shape[0] // num_experts)
    for e, tokens in _tokens(ends):
        weight = reference.linear_weight(*stack.expert(e, num_experts), c, fmt, scale_dtype, x.dtype)
        y[tokens] = torch.nn.functional.linear(x[tokens], weight)
    return y


def expert_linear_backward(
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
    fmt: BaseFormat,
    scale_dtype: str,
    need_x: bool,
    need_shift: bool,
    need_AB: bool,
) -> reference.Gradients:
    """Compute the gradients of `expert_linear`: those of the stack as in `expert_weights_backward`.

    Args:
        dy, x: (T, out) and (T, in), one dtype.
        y: the output, or None; see `experts_keep_output`.
        ends to scale_dtype: as for `expert_linear`.
    """
    stack, num_experts = Stack(base, scale0, shift, zero_point, A, B), ends.shape[0]
    total, needs = zero_gradients(stack, need_shift, need_AB), (need_x, need_shift, need_AB)
    dx = torch.empty_like(x) if need_x else None
    for e, tokens in _tokens(ends):
        expert, of_y = stack.expert(e, num_experts), None if y is None else y[tokens]
        found = reference.linear_backward(dy[tokens], x[tokens], of_y, *expert, c, fmt, scale_dtype, *needs)
        add_expert(total, found, stack, e, num_experts)
        if dx is not None and found.x is not None:
            dx[tokens] = found.x
    return total._replace(x=dx)


def experts_keep_output(scale0: Tensor, shift: Tensor | None, bits: int) -> bool:
    """Tell whether the backward wants Y."""
    return reference.keeps_output(scale0, shift, bits)


def _tokens(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """List the experts that have tokens, and which."""
    begin = 0
    for e, end in enumerate(ends.tolist()):
        if begin < end:
            yield e, slice(begin, end)
        begin = end


def zero_gradients(stack: Stack, need_shift: bool, need_AB: bool) -> reference.Gradients:
    """Make the gradients of a stack in which no expert had a token: fp32 zeros, None where not needed."""
    shift, A, B = (
        torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device) if need and tensor is not None else None
        for need, tensor in ((need_shift, stack.shift), (need_AB, stack.A), (need_AB, stack.B))
    )
    return reference.Gradients(None, shift, A, B)


def add_expert(total: reference.Gradients, found: reference.Gradients, stack: Stack, e: int, num_experts: int) -> None:
    """Add the gradients of one expert to those of its stack. (A scale of the whole tensor is every expert's.)"""
    view = stack._replace(shift=total.shift, A=total.A, B=total.B).expert(e, num_experts)
    for place, gradient in ((view.shift, found.shift), (view.A, found.A), (view.B, found.B)):
        if place is not None and gradient is not None:
            place += gradient


def _listed(experts: Tensor | None, num_experts: int) -> list[int]:
    return list(range(num_experts)) if experts is None else experts.tolist()
