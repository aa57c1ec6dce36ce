"""The options of `LowBitAdamW` and of each of its parameter groups: what they may be, and what a file has of them."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..common import rules
from .remainder import Rate
from .tensor import LowBitTensor

STATES = ("8bit", "factored", "fp32")
LR_UNITS = ("weight", "grid")


def _are_betas(value: Any) -> bool:
    pair = isinstance(value, Sequence) and len(value) == 2 and all(map(rules.NUMBER.allows, value))
    return pair and all(0 <= beta < 1 for beta in value)


_RULES = {
    "betas": rules.Rule("it must be two numbers, each from 0 to below 1", _are_betas),
    "eps": rules.NOT_NEGATIVE,
    "weight_decay": rules.NOT_NEGATIVE,
    "state": rules.one_of(*STATES),
    "lr_unit": rules.one_of(*LR_UNITS),
    "error_feedback": rules.optional(rules.FLAG),
    "latent_weights": rules.optional(rules.FLAG),
}

#: The options of a group that a `reference_step.Rule` is made of, but for `betas`.
of_rule = operator.itemgetter("eps", "weight_decay", "error_feedback", "lr_unit", "state", "latent_weights")


def check_options(group: dict[str, Any]) -> None:
    """Raise ValueError for options of a parameter group, or of all, that are out of range."""
    lr: Rate = group["lr"]
    if not isinstance(lr, torch.Tensor) and not rules.NOT_NEGATIVE.allows(lr):
        raise ValueError(
            f"`lr` is {lr!r}; it must be a number of 0 or more, and finite, or a tensor with one. (YAML reads 1e-3 as "
            "text, and 1.0e-3 as a number.)"
        )
    for name, rule in _RULES.items():
        rules.check_value(name, group[name], rule)


def has_latent_weights(parameter: LowBitTensor, group: dict[str, Any]) -> bool:
    """Whether a weight of a group has latent weights; where the option is None, ternary ones do."""
    wanted: bool | None = group["latent_weights"]
    return parameter.grid.ternary if wanted is None else wanted


def warn_of_latent_weights(asked: list[tuple[bool, bool | None]], loaded: list[tuple[bool, bool | None]]) -> None:
    """Say where weights go on as a file has them, and not as the optimizer was made.

    Args:
        asked: `LowBitAdamW._latent_weights` before loading.
        loaded: the same afterwards.
    """
    for has, word, change in ((False, "without", "begin"), (True, "with", "end")):
        pairs = zip(asked, loaded, strict=True)
        other = [(wanted, kept) for (was, wanted), (now, kept) in pairs if now is has and was is not has]
        if other:
            columns = zip(*other, strict=True)
            wanted, kept = (" or ".join(sorted({str(option) for option in options})) for options in columns)
            warnings.warn(
                f"The optimizer's state was saved {word} latent weights, and {len(other)} weights go on {word} them, "
                f"as their training began. To {change} with them here, set `latent_weights` of the optimizer's "
                f"parameter groups to {wanted} after loading; to hear nothing of it, make it with "
                f"`latent_weights={kept}`.",
                stacklevel=3,
            )
