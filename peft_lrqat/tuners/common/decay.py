"""A warning where weight decay is given to the fixed scales of inputs, which are trained as logarithms.

Decay takes a parameter towards 0. That is no change where a relative change of scales is trained, but a scale of 1
where log2 of the scale is: some hundreds of steps of inputs that need a hundredth. The Trainer's own optimizer decays
whatever is no bias and no norm.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .first_step import FirstStep


def _look(optimizer: Optimizer, found: list[tuple[dict[str, Any], list[Any]]]) -> None:
    decay = max(float(group.get("weight_decay") or 0) for group, _ in found)
    if decay:
        warnings.warn(
            f"`weight_decay` is {decay:g} for the fixed scales of inputs (`act_scale='static'`) too, of which the "
            "logarithm is trained: it pulls every one of them towards 1. Give them a parameter group with "
            "`weight_decay=0`, as `create_lrqat_optimizer` does for LR-QAT.",
            stacklevel=3,
        )


_first_step = FirstStep(_look)


def watch(log2: nn.Module) -> None:
    """Look at the weight decay in the first step of the next optimizer that trains `log2.weight`, log2 of a scale."""
    _first_step.watch(log2)
