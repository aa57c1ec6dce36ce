"""Rounding a layer's input to 8 bits per token, as the engine that serves the checkpoint will do it.

Two rules are in use. They differ in how many steps the largest magnitude of a token takes, in the dtype that they
compute in and in their order of operations, so each is written as its engine writes it, and named after the checkpoint
format whose engines round so. What is trained is then what is served, to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The rules, by the name of the checkpoint format.
ACTIVATION_RULES = ("compressed-tensors", "bitnet")

#: How many steps the largest magnitude of a token takes.
_LEVELS = {"compressed-tensors": 127.5, "bitnet": 127.0}


def round_activations(x: Tensor, rule: str) -> Tensor:
    """Round each token to an 8-bit grid by its largest magnitude, straight through (BitNet b1.58, arXiv 2402.17764).

    Args:
        x: (..., in), any float dtype, a token per row.
        rule: one of `ACTIVATION_RULES`.

    Returns:
        (..., in) in x's dtype: clip(round(x / a), -128, 127) * a with a = max |x| / levels, where levels is 127 in
        BitNet and 127.5 in compressed-tensors.

    Raises:
        ValueError: there is no such rule.
    """
    if rule not in ACTIVATION_RULES:
        raise ValueError(f"`rule` is {rule!r}; allowed are {', '.join(map(repr, ACTIVATION_RULES))}.")
    with torch.no_grad():
        rounded = _bitnet(x) if rule == "bitnet" else _compressed_tensors(x)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def describe_rule(rule: str | None) -> str:
    """Describe a rule in a few words for messages; None: "floats"."""
    return "floats" if rule is None else f"{_LEVELS[rule]:g} steps for a token's largest magnitude"


def _largest(x: Tensor) -> Tensor:
    """Find each token's largest magnitude: fp32 (..., 1)."""
    return x.float().abs().amax(dim=-1, keepdim=True)


def _bitnet(x: Tensor) -> Tensor:
    # the operations, in the order, of transformers' `ActQuant`
    scale = 127 / _largest(x).clamp(min=1e-5)
    return ((x.float() * scale).round().clamp(-128, 127) / scale).to(x.dtype)


def _compressed_tensors(x: Tensor) -> Tensor:
    # compressed-tensors keeps the scale in the activations' dtype, and computes in it
    scale = (_largest(x) / _LEVELS["compressed-tensors"]).to(x.dtype)
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    return (x / scale).round().clamp(-128, 127) * scale
