"""A warning where weight decay is given to the fixed scales of inputs, which are trained as logarithms.

Decay takes a parameter towards 0. That is no change where a relative change of scales is trained, but a scale of 1
where log2 of the scale is: some hundreds of steps of inputs that need a hundredth. The Trainer's own optimizer decays
whatever is no bias and no norm.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_MARK = "_log2_of_a_scale"

# whether the hook is there, and whether it has something to look for: torch does not like it if it removes itself
_installed = _waiting = False


def watch(parameter: Any) -> None:
    """Look at the weight decay in the first step of the next optimizer that trains log2 of a scale."""
    global _installed, _waiting
    setattr(parameter, _MARK, True)
    if not _installed:
        register_optimizer_step_pre_hook(_check)
    _installed = _waiting = True


def _check(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """torch calls it before the steps of all optimizers."""
    global _waiting
    if not _waiting:
        return
    found = [group for group in optimizer.param_groups if any(hasattr(p, _MARK) for p in group["params"])]
    if not found:
        return
    _waiting = False
    decay = max(float(group.get("weight_decay") or 0) for group in found)
    if decay:
        warnings.warn(
            f"`weight_decay` is {decay:g} for the fixed scales of inputs (`act_scale='static'`) too, of which the "
            "logarithm is trained: it pulls every one of them towards 1. Give them a parameter group with "
            "`weight_decay=0`, as `create_lrqat_optimizer` does for LR-QAT.",
            stacklevel=2,
        )
