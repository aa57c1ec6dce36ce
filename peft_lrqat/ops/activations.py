"""Rounding a layer's input to 8 or 4 bits, per token or per group of its inputs, as the engine that serves it will.

Whose arithmetic rounds is a rule of `reference_inputs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference_inputs
from .dispatch import kernels_for, on_device_of
from .reference_inputs import ACTIVATION_RULES, PER_TOKEN, rule_steps
from .static_inputs import round_static

__all__ = ["PER_TOKEN", "Activations", "describe_activations", "round_activations"]


@dataclass(frozen=True)
class Activations:
    """How a layer rounds its input: to a symmetric grid whose scales are found anew for every token, or are fixed.

    Attributes:
        rule: one of `ACTIVATION_RULES`.
        bits: 8 or 4.
        group_size: how many consecutive inputs share a scale; -1: all of a token.
        static: one scale for all inputs of the layer, which is stored (`static_inputs.py`).

    Raises:
        ValueError: there is no such rule.
    """

    rule: str
    bits: int = 8
    group_size: int = PER_TOKEN
    static: bool = False

    def __post_init__(self) -> None:
        if self.rule not in ACTIVATION_RULES:
            raise ValueError(f"`rule` is {self.rule!r}; allowed are {', '.join(map(repr, ACTIVATION_RULES))}.")

    @property
    def steps(self) -> float:
        """How many steps the largest magnitude takes."""
        return rule_steps(self.rule, self.bits)

    def describe(self) -> str:
        """Say it in a few words, for messages."""
        if self.static:
            return f"{self.bits} bits, one fixed scale"
        shared = "a token" if self.group_size == PER_TOKEN else f"{self.group_size} inputs"
        return f"{self.bits} bits, {self.steps:g} steps for the largest magnitude of {shared}"


def describe_activations(activations: Activations | None) -> str:
    """Say in a few words how inputs are rounded; None: "floats"."""
    return "floats" if activations is None else activations.describe()


def round_activations(x: Tensor, activations: Activations, scale: Tensor | None = None) -> Tensor:
    """Round a layer's input, with a straight-through gradient.

    Args:
        x: (..., in), any float dtype, a token per row.
        scale: the fixed one, see `round_static`; None: `activations` are dynamic.

    Returns:
        (..., in) in x's dtype: clip(round(x / a), -2^(bits - 1), 2^(bits - 1) - 1) * a with a = max |x| / steps over a
        token or a group.

    Raises:
        ValueError: the engine of the rule would take other inputs together than those of a token.
    """
    rule, bits, group_size = activations.rule, activations.bits, activations.group_size
    if scale is not None:
        return round_static(x, scale, bits)
    check_input(x, activations)
    if torch.compiler.is_compiling():
        return _rounded_op(x, rule, bits, group_size)
    return _Rounded.apply(x, rule, bits, group_size)


def check_input(x: Tensor, activations: Activations) -> None:
    """Raise ValueError if the engine of the rule would take other inputs together than those of a token."""
    if activations.rule == "compressed-tensors" and activations.group_size == PER_TOKEN and x.dim() != 3:
        raise ValueError(
            f"A layer that rounds its input per token was given one of shape {tuple(x.shape)}. Of inputs that are not "
            "(batch, tokens, features), transformers rounds all tokens with one scale (compressed-tensors keeps the "
            "first two dimensions apart), so this model would not be served as it was trained. Train with "
            "`act_rule='vllm'`, whose engine rounds each token, with `act_group_size`, or leave such layers out: "
            "`exclude_modules`, or `act_bits_pattern={'name': None}`."
        )


def rounded_values(x: Tensor, activations: Activations) -> Tensor:
    """Compute the numbers that `round_activations` returns for dynamic scales.

    Args:
        x: without a graph.
    """
    check_input(x, activations)
    return _rounded_impl(x, activations.rule, activations.bits, activations.group_size)


def straight_through(x: Tensor, values: Tensor) -> Tensor:
    """Return numbers that x was rounded to, with a straight-through gradient.

    Args:
        x: differentiable.
        values: of x's shape, in any float dtype, without a graph.

    Raises:
        NotImplementedError: x has a tangent (forward-mode differentiation), which would be lost.
    """
    recorded = torch.is_grad_enabled() and x.requires_grad
    # torch refuses an input with a tangent by itself, but only where the function is called
    return _StraightThrough.apply(x, (values,)) if recorded or forward_ad._current_level >= 0 else values


def _rounded_impl(x: Tensor, rule: str, bits: int, group_size: int) -> Tensor:
    kernels = kernels_for(x) if x.dtype != torch.float64 else None
    if kernels is None:
        return reference_inputs.rounded_inputs(x, rule, bits, group_size)
    with on_device_of(x):
        return kernels.rounded_inputs(x, rule, bits, group_size)


# as in `linear.py`: an op for torch.compile, the same function in eager mode, whose dispatch costs less
@torch.library.custom_op("peft_lrqat::round_activations", mutates_args=())
def _rounded_op(x: Tensor, rule: str, bits: int, group_size: int) -> Tensor:
    return _rounded_impl(x, rule, bits, group_size).contiguous()


@_rounded_op.register_fake
def _(x, rule, bits, group_size):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_rounded_op.register_autograd(lambda ctx, dy: (dy, None, None, None), setup_context=lambda ctx, inputs, output: None)


class _Rounded(torch.autograd.Function):
    """The rounded values themselves, not x plus a difference, which is another number where that is rounded."""

    @staticmethod
    def forward(ctx, x, rule, bits, group_size):
        return _rounded_impl(x, rule, bits, group_size)

    @staticmethod
    def backward(ctx, dy):
        return dy, None, None, None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values):  # in a tuple, into which torch does not look
        return values[0].detach()  # others may have the same numbers; the graph is this object's

    @staticmethod
    def backward(ctx, dy):
        return dy, None
