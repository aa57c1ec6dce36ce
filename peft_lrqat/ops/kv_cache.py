"""Rounding keys and values as they are written to the cache, per token and head, as the engine that serves it will.

Every token's key, and its value, in every head is rounded by itself, with a scale that follows from its own numbers. So
nothing depends on the length of a prompt, on padding or on what is generated later, and rounding at the writing is all
there is: what is read from the cache was rounded once. Engines differ; each rule is written as its engine writes it:

    transformers    with compressed-tensors, whose rule of activations it is: symmetric, 127.5 or 7.5 steps
    vllm, 8 bits    `--kv-cache-dtype int8_per_token_head`: symmetric, 127 steps, ties away from zero
    vllm, 4 bits    `--kv-cache-dtype int4_per_token_head`: a Hadamard rotation of each head with random signs, then 16
                    levels from the smallest to the largest number; the queries are rotated as well, which comes to the
                    same as rotating keys and values back
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference_cache
from .activations import Activations, round_activations
from .dispatch import kernels_for, on_device_of

#: The rules, by the engine that rounds so.
CACHE_RULES = ("transformers", "vllm")

#: The widths that they have.
CACHE_BITS = (8, 4)


@dataclass(frozen=True)
class CacheRounding:
    """How keys and values are rounded.

    Attributes:
        bits: 8 or 4.
        rule: one of `CACHE_RULES`.
        group_size: how many consecutive numbers of a head share a scale ("transformers": all of them, or, where
            heads of a model differ in size, as many as divide them all); None ("vllm"): all of them.

    Raises:
        ValueError: there are no such bits, no such rule, or the group size is not the rule's.
    """

    bits: int
    rule: str = CACHE_RULES[0]
    group_size: int | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (("bits", self.bits, CACHE_BITS), ("rule", self.rule, CACHE_RULES)):
            if isinstance(value, bool) or value not in allowed:
                raise ValueError(f"`{name}` of a KV cache is {value!r}; allowed are {', '.join(map(repr, allowed))}.")
        size, grouped = self.group_size, self.rule == "transformers"
        if grouped != (isinstance(size, int) and not isinstance(size, bool) and size > 0):
            wanted = "a positive integer" if grouped else "None"
            raise ValueError(f"`group_size` of a KV cache is {size!r}; with the rule {self.rule!r} it is {wanted}.")

    def describe(self) -> str:
        """Say it in a few words, for messages."""
        return f"{self.bits} bits per token and head, by the rule of {self.rule}"

    def entry(self) -> dict[str, Any]:
        """Return what config.json says about it."""
        return {"bits": self.bits, "rule": self.rule, "group_size": self.group_size}


def describe_cache(rounding: CacheRounding | None) -> str:
    """Say in a few words how a cache is rounded; None: "floats"."""
    return "floats" if rounding is None else rounding.describe()


def round_states(states: Tensor, rounding: CacheRounding) -> Tensor:
    """Round keys or values, with a straight-through gradient.

    Args:
        states: (batch, heads, tokens, head size), any float dtype; keys after the rotary embedding.

    Returns:
        The same shape and dtype: what an engine reads back from its cache.

    Raises:
        ValueError: the group size does not divide the head size.
    """
    bits, size = rounding.bits, rounding.group_size
    if size is not None:
        if states.shape[-1] % size:
            raise ValueError(
                f"Keys or values have {states.shape[-1]} numbers a head, which groups of {size} do not divide: heads "
                "are not what the model's configuration says. Leave `kv_bits` out, or use `kv_rule='vllm'`."
            )
        return round_activations(states, Activations("compressed-tensors", bits, size))
    # an op for torch.compile, which would compute in another order, and the same function in eager mode
    return _rounded_op(states, bits) if torch.compiler.is_compiling() else _Rounded.apply(states, bits)


def _rounded(states: Tensor, bits: int) -> Tensor:
    kernels = kernels_for(states) if states.dtype != torch.float64 else None
    if kernels is None:
        return reference_cache.rounded_states(states, bits)
    with on_device_of(states):
        return kernels.rounded_states(states, bits)


@torch.library.custom_op("peft_lrqat::round_states", mutates_args=())
def _rounded_op(states: Tensor, bits: int) -> Tensor:
    return _rounded(states, bits).contiguous()


@_rounded_op.register_fake
def _(states, bits):
    return torch.empty_like(states, memory_format=torch.contiguous_format)


_rounded_op.register_autograd(lambda ctx, dy: (dy, None), setup_context=lambda ctx, inputs, output: None)


class _Rounded(torch.autograd.Function):
    """The rounded values themselves: x plus a difference would be another number where that is rounded."""

    @staticmethod
    def forward(ctx, states, bits):
        return _rounded(states, bits)

    @staticmethod
    def backward(ctx, dy):
        return dy, None
