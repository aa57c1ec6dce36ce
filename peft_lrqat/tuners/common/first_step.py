"""A look at an optimizer in its first step, when its options are known: to warn of those that do harm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


def rate_of(group: dict[str, Any]) -> float | None:
    """The highest rate of a group whose parameters move by about the rate in each update, or None."""
    rate = max(float(group["lr"]), float(group.get("initial_lr", 0)))
    return None if "betas" not in group or "d" in group or not rate else rate


class FirstStep:
    """Waits for the next optimizer that trains the `weight` of modules which it was told of.

    It remembers modules: PEFT, where it casts an adapter to fp32, and FSDP2 put other parameters into them.

    Args:
        look: called once, with the optimizer and its groups that have such weights, each with what was said of them.
    """

    def __init__(self, look: Callable[[Optimizer, list[tuple[dict[str, Any], list[Any]]]], None]) -> None:
        self._look = look
        self._said: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
        # whether the hook is there, and whether it has something to look for: torch does not like it to remove itself
        self._installed = self._waiting = False

    def watch(self, module: nn.Module, value: Any = True) -> None:
        """Wait for the optimizer that trains `module.weight`, of which `value` is said then."""
        self._said[module] = value
        if not self._installed:
            register_optimizer_step_pre_hook(self._check)
        self._installed = self._waiting = True

    def _check(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """torch calls it before the steps of all optimizers."""
        if not self._waiting:
            return
        said = {id(getattr(module, "weight", None)): value for module, value in self._said.items()}
        groups = ((group, [said[id(p)] for p in group["params"] if id(p) in said]) for group in optimizer.param_groups)
        if found := [(group, values) for group, values in groups if values]:
            self._waiting = False
            self._look(optimizer, found)
