"""A warning where the learning rate is so low that hardly any weight would ever leave its grid cell, or no scale move.

A rule like AdamW moves every entry of lora_B by about the learning rate in each step, and so a weight by about

    c rate sqrt(r / (3 in))        in grid steps

at the start of training, where lora_B is 0 and the entries of lora_A are uniform in +-1 / sqrt(in). A weight has to
move by half a step, on average, to become another integer. With the default rate and strength that takes some hundred
updates; with rates that suit other trainings (TRL's default is 2e-5) it would take more than ten thousand, and only the
scales would learn. Where these are all that is trained (a rank of 0), a scale moves by about the learning rate in each
update, in parts of itself.
"""

from __future__ import annotations

import warnings
from statistics import median
from typing import Any

from torch.optim import Optimizer

from ..common.first_step import FirstStep, rate_of

# updates until a typical weight has moved by half a grid step
_FAR_TOO_MANY = 10_000
# below it a scale takes more than a hundred updates to move by a hundredth; 1e-3 is what was measured
_LOW_FOR_SCALES = 1e-4


def _look(optimizer: Optimizer, found: list[tuple[dict[str, Any], list[float]]]) -> None:
    group, steps = found[0]
    if (rate := rate_of(group)) is None:
        return
    updates = 0.5 / (rate * median(steps))
    if updates > _FAR_TOO_MANY:
        warnings.warn(
            f"The learning rate of LR-QAT's adapters is {rate:.2g}: {type(optimizer).__name__} would take about "
            f"{updates:.0f} updates to move a typical weight by half a grid step, so hardly any becomes another "
            "integer, and only the scales learn. 1e-3 with the default `lora_alpha` is a good start "
            "(docs/guides/sft.md); for a lower rate raise `lora_alpha`.",
            stacklevel=3,
        )


def _look_at_scales(optimizer: Optimizer, found: list[tuple[dict[str, Any], list[Any]]]) -> None:
    rate = rate_of(found[0][0])
    if rate is not None and rate < _LOW_FOR_SCALES:
        warnings.warn(
            f"The learning rate of LR-QAT's scales is {rate:.2g}, and with `r=0` they are all of it that is trained: "
            f"{type(optimizer).__name__} would take about {0.01 / rate:.0f} updates to move one by a hundredth. 1e-3 "
            "is a good start (docs/guides/best-accuracy.md).",
            stacklevel=3,
        )


_first_step = FirstStep(_look)
_first_step_of_scales = FirstStep(_look_at_scales)


def watch(B: Any, in_features: int, strength: float) -> None:
    """Look at the learning rate in the first step of the next optimizer that trains the factor `B`.

    Args:
        B: its `weight`, (out, r), is the parameter.
        strength: c, in grid steps (in a row's largest with `learn_scales="channel"`: at least so many then).
    """
    _first_step.watch(B, strength * (B.weight.shape[1] / (3 * in_features)) ** 0.5)


def watch_scales(shift: Any) -> None:
    """The same for an adapter of rank 0: the `weight` of `shift` is the relative change of the scales."""
    _first_step_of_scales.watch(shift)
