"""A look at an optimizer in its first step, when its options are known: to warn of those that do harm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


class FirstStep:
    """Waits for the next optimizer that trains parameters which it was told of.

    Args:
        mark: the name of an attribute that these parameters get.
        look: called once, with the optimizer and its groups that have such parameters, each with their attributes.
    """

    def __init__(self, mark: str, look: Callable[[Optimizer, list[tuple[dict[str, Any], list[Any]]]], None]) -> None:
        self._mark, self._look = mark, look
        # whether the hook is there, and whether it has something to look for: torch does not like it to remove itself
        self._installed = self._waiting = False

    def watch(self, parameter: Any, value: Any = True) -> None:
        """Wait for the optimizer that trains `parameter`; `value` is what its attribute will say."""
        setattr(parameter, self._mark, value)
        if not self._installed:
            register_optimizer_step_pre_hook(self._check)
        self._installed = self._waiting = True

    def _check(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """torch calls it before the steps of all optimizers."""
        if not self._waiting:
            return
        marked = (
            (group, [getattr(p, self._mark) for p in group["params"] if hasattr(p, self._mark)])
            for group in optimizer.param_groups
        )
        if found := [(group, values) for group, values in marked if values]:
            self._waiting = False
            self._look(optimizer, found)
