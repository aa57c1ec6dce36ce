"""The references of the operations on a stack of experts (`experts.py`): every expert is a linear layer of its own.

So each is given to the reference of the dense layer (`reference.py`), one after the other, and gets its numbers.
"""

from __future__ import annotations

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
