"""Bases that stay where they are: accelerate may not take their tensors away between calls.

`accelerate.cpu_offload` and `disk_offload` leave parameters on the meta device, and bring those of a module in when it
is called. The layer around a base reads its integers without calling it, with factors of other modules, and again in
backward: it would find nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_REFUSED = (
    "accelerate offloads this model (`cpu_offload`, `disk_offload`, or a device map with 'cpu' or 'disk'), but its "
    "layers on a grid read their integers without a call for which accelerate would bring them in. "
    "`accelerate.hooks.remove_hook_from_module(model, recurse=True)`, of the model that it was given, brings back what "
    "it has taken away until now. Use `LRQATConfig(offload_base=True)`, which keeps the base in the CPU's memory; or "
    "offload what `merge_and_unload()` returns."
)


def takes_away(hook: Any) -> bool:
    """Whether a hook of accelerate, or one of several, takes the tensors of its module away between calls."""
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))


class StaysHere(nn.Module):
    """A module whose tensors are read without calling it. It is a ValueError when accelerate begins to offload it."""

    def __setattr__(self, name: str, value: Any) -> None:
        # accelerate's `add_hook_to_module` sets the first before the hook takes tensors away, the second afterwards
        if name == "_old_forward":
            vars(self)["_held"] = dict(self._parameters)
        elif name == "_hf_hook":
            held = vars(self).pop("_held", {})
            if takes_away(value):
                self._parameters.update(held)
                vars(self).pop("_old_forward", None)
                raise ValueError(_REFUSED)
        super().__setattr__(name, value)
