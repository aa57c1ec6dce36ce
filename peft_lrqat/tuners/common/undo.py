"""Conversion that can be taken back: after an error the model is what it was.

An `Undo` photographs modules and configurations before anything happens to them: their attributes, what their
containers hold (children, parameters, hooks, PEFT's dicts of adapters) and which parameters are trained. No tensor is
copied, because nothing writes to one: conversion *replaces* modules. So a weight can be put back as long as it is
alive, and that is the one thing that costs memory.

`keep` decides about it, once, before the first layer: if every device has room for the float weights and the converted
ones together, the float weights live until the last layer is done, and any error is undone. If not, each float weight
is freed as soon as its layer is converted, so that conversion needs the memory of one layer above the loaded model; an
error after the first layer then leaves a model that has to be loaded again, and says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...chunks import chunk_size

_CGROUP = Path("/sys/fs/cgroup")
#: (folder, limit, use) of a container's memory, in version 2 and in version 1.
_LIMITS = (
    (_CGROUP, "memory.max", "memory.current"),
    (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


class Undo:
    """What some objects were.

    Attributes:
        keeps: whether replaced weights live until `done`.
        total, freed: how many layers are to be converted, and how many have lost their float weight.
    """

    def __init__(self, things: Iterable[Any]) -> None:
        """Photograph modules and configurations; None is skipped."""
        self.keeps = True
        self.total = self.freed = 0
        self._states = {id(thing): _State(thing) for thing in things if thing is not None}
        self._replaced: list[nn.Module] = []

    def keep(self, targets: Iterable[nn.Module], bytes_per_weight: float) -> None:
        """Decide whether replaced weights are kept.

        Args:
            targets: what will be converted; layers that are adapted already do not count.
            bytes_per_weight: size of the converted layers.
        """
        sizes: dict[torch.device, list[int]] = {}
        for module in targets:
            if not isinstance(module, BaseTunerLayer):
                device, weights = _place(module)
                sizes.setdefault(device, []).append(weights)
        self.total = sum(map(len, sizes.values()))
        self.keeps = all(
            needed_bytes(weights, bytes_per_weight, device) < 0.9 * free_bytes(device)
            for device, weights in sizes.items()
        )

    def replaced(self, module: nn.Module) -> None:
        """Take note that a module was replaced by its converted form, which does not need its weight any more."""
        if self.keeps:
            self._replaced.append(module)
        else:
            self._states.pop(id(module), None)
            _drop_weight(module)
            self.freed += 1

    def done(self) -> None:
        """Free what was kept: there is nothing to undo any more."""
        for module in self._replaced:
            _drop_weight(module)
        self._replaced.clear()
        self._states.clear()

    def retake(self, modules: Iterable[nn.Module]) -> None:
        """Photograph modules anew; what others replaced since the first time may be freed."""
        kept = {key: state for key, state in self._states.items() if not isinstance(state.thing, nn.Module)}
        self._states = kept | {id(module): _State(module) for module in modules}

    def restore(self) -> bool:
        """Put everything back. If weights have been freed already, the modules stay as they are.

        Returns:
            Whether all is as it was.
        """
        for state in self._states.values():
            if not self.freed or not isinstance(state.thing, nn.Module):
                state.restore()
        return not self.freed

    def explain(self) -> str:
        """Why the model could not be put back."""
        return (
            f"{self.freed} of {self.total} layers were already converted when this error came, and there was no room "
            "to keep their float weights until the last one. The model is neither converted nor what it was: load it "
            "again."
        )


def needed_bytes(weights: list[int], bytes_per_weight: float, device: torch.device) -> float:
    """Bytes that conversion takes above the float model while that is kept, at most.

    A byte a weight is for scales and adapters; work space is a few times the largest layer, or row chunk, in fp32.
    """
    return (bytes_per_weight + 1) * sum(weights) + 16 * max(*weights, chunk_size(device))


def free_bytes(device: torch.device) -> float:
    """Bytes that this process may still allocate on a device; 0 where nobody can tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        import psutil  # comes with accelerate

        # a launcher's processes on one machine convert at the same time
        ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
        return min(psutil.virtual_memory().available, _container_room()) / ranks
    return 0.0


def _container_room() -> float:
    """Bytes until a container's limit, the cache of files not counted as used; infinite without one."""
    for folder, limit, use in _LIMITS:
        try:
            room = int((folder / limit).read_text()) - int((folder / use).read_text())
            counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        return room + sum(int(counters.get(name, 0)) for name in ("inactive_file", "active_file"))
    return math.inf


def _place(module: nn.Module) -> tuple[torch.device, int]:
    """Device and number of weights of a layer, float or quantized."""
    weight = module._parameters.get("weight")
    if weight is not None:
        return weight.device, weight.numel()
    packed: Any = module  # a layer that is quantized already has its shape as attributes
    return packed.weight_packed.device, packed.out_features * packed.in_features


def _drop_weight(module: nn.Module) -> None:
    if "weight" in module._parameters:
        module.register_parameter("weight", None)
    else:  # packed codes, scales and zero points
        module._buffers.clear()


class _State:
    """An object's attributes, and the contents of those that are containers."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing
        self.attributes = dict(vars(thing))
        self.contents = {
            name: _contents(value) for name, value in self.attributes.items() if isinstance(value, (dict, list, set))
        }
        parameters = thing._parameters.values() if isinstance(thing, nn.Module) else ()
        self.trained = [(parameter, parameter.requires_grad) for parameter in parameters if parameter is not None]

    def restore(self) -> None:
        attributes = vars(self.thing)
        for name in attributes.keys() - self.attributes.keys():
            del attributes[name]
        attributes.update(self.attributes)
        for name, before in self.contents.items():
            container = self.attributes[name]
            now = _contents(container)
            if len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True)):
                continue
            container.clear()
            if isinstance(container, dict):
                container.update(zip(before[::2], before[1::2], strict=True))
            elif isinstance(container, list):
                container.extend(before)
            else:
                container.update(before)
        for parameter, trained in self.trained:
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)


def _contents(container: dict | list | set) -> list:
    """What a container holds; of a dict, keys and values in turn."""
    if isinstance(container, dict):
        return [part for pair in container.items() for part in pair]
    return list(container)
