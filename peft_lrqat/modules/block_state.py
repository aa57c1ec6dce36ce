"""What a CUDA graph of a block depends on beside its inputs, and what in a block a graph could not repeat.

A replay runs kernels on addresses. It runs no Python: no hook, no branch on `training` or on the active adapter, no
draw of a random number on the CPU. So a graph holds as long as everything that Python would have looked at is as it was
while it was recorded: modules, the addresses of their tensors, and their plain attributes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from . import kv_cache

#: Attributes of nn.Module that are watched in another way, or not at all.
_MODULE = {*vars(nn.Module()), "_gradient_checkpointing_func", "gradient_checkpointing"} - {"training"}
#: Where nn.Module keeps hooks that a forward or a backward runs.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MISSING = object()


def why_unfit(block: nn.Module, hooks_of_itself: bool = True) -> str | None:
    """Say what in a block a graph could not repeat; None: nothing that can be seen.

    Args:
        hooks_of_itself: whether hooks on the block itself would be in the graph, too.

    Returns:
        A clause that names the module, for a sentence that says what is not done.
    """
    devices: dict[torch.device, str] = {}
    for name, module in block.named_modules():
        what = f"{name or type(block).__name__!r} ({type(module).__name__})"
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{what} drops out with p={module.p}, and the recomputation would drop others (set it to 0)"
        dropped = getattr(module, "attention_dropout", 0.0)
        if isinstance(dropped, float) and dropped > 0:
            return f"{what} has `attention_dropout={dropped}`, and the recomputation would drop others (set it to 0)"
        if hasattr(module, "_hf_hook"):
            return f"{what} has a hook of accelerate (`device_map`), which a replay would not run"
        if (name or hooks_of_itself) and (hook := next(_hooks(module), None)) is not None:
            return f"{what} has a hook, {getattr(hook, '__qualname__', hook)}, which a replay would not run"
        for part, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            place = f"{name}.{part}".lstrip(".")
            devices.setdefault(tensor.device, place)
            if hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id"):
                return f"{place!r} is sharded over processes (FSDP, DeepSpeed, tensor parallelism)"
            if tensor.requires_grad and type(tensor) is not nn.Parameter:
                return f"{place!r}, which is trained, is a {type(tensor).__name__}, whose values lie elsewhere"
    if len(devices) > 1:
        found = ", ".join(f"{place!r} on {device}" for device, place in devices.items())
        return f"its tensors lie on several devices: {found}"
    return None


def _hooks(module: nn.Module) -> Iterator[Any]:
    for kind in _HOOKS:
        yield from (hook for hook in getattr(module, kind).values() if hook not in kv_cache.HOOKS)


class BlockState:
    """A block as it is now.

    Attributes:
        parameters: those that need gradients.
    """

    def __init__(self, block: nn.Module) -> None:
        self._entries: list[tuple[dict, Any, Any, str]] = []  # dictionary, key, what was there, name for people
        self._tensors: list[tuple[dict, Any, torch.Tensor, int, bool, str]] = []
        self._sizes: list[tuple[Any, int, str]] = []
        self.parameters: list[nn.Parameter] = []
        self._places: list[tuple[dict, Any, int]] = []  # dictionary, key, number among `parameters`
        for name, module in block.named_modules():
            self._watch(module, name)
        self._layout = [(config, config._attn_implementation) for config in _configs(block)]

    def _watch(self, module: nn.Module, name: str) -> None:
        inside = f"{name}." if name else ""
        name = name or "the block"
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is None:
                    self._entries.append((table, key, None, inside + str(key)))
                    continue
                self._tensors.append((table, key, tensor, tensor.data_ptr(), tensor.requires_grad, inside + str(key)))
                if tensor.requires_grad:
                    self._places.append((table, key, self._number(tensor)))
        for key, child in module._modules.items():
            self._entries.append((module._modules, key, child, inside + str(key)))
        for kind in _HOOKS:
            self._sizes.append((getattr(module, kind), len(getattr(module, kind)), f"hooks of {name}"))
        attributes = vars(module)
        self._sizes.append((attributes, len(attributes), f"attributes of {name}"))
        for key, value in attributes.items():
            if isinstance(value, torch.Tensor):
                self._tensors.append((attributes, key, value, value.data_ptr(), value.requires_grad, inside + str(key)))
            elif key not in _MODULE and _plain(value):
                self._entries.append((attributes, key, _copied(value), inside + str(key)))

    def _number(self, parameter: Any) -> int:
        """Its place among `parameters`, where it is put."""
        found = next((i for i, other in enumerate(self.parameters) if other is parameter), len(self.parameters))
        if found == len(self.parameters):
            self.parameters.append(parameter)
        return found

    @contextlib.contextmanager
    def with_parameters(self, others: Sequence[nn.Parameter]) -> Iterator[None]:
        """A context in which other parameters stand in the places of `parameters`."""
        try:
            for table, key, number in self._places:
                table[key] = others[number]
            yield
        finally:
            for table, key, number in self._places:
                table[key] = self.parameters[number]

    def changed(self) -> str | None:
        """The name of something that is not as it was; None: all is."""
        for table, key, tensor, address, needs, name in self._tensors:
            if table.get(key) is not tensor or tensor.data_ptr() != address or tensor.requires_grad != needs:
                return name
        for table, key, value, name in self._entries:
            found = table.get(key, _MISSING)
            if found is not value and (isinstance(value, nn.Module) or found != value):
                return name
        for container, size, name in self._sizes:
            if len(container) != size:
                return name
        for config, implementation in self._layout:
            if config._attn_implementation != implementation:
                return "the implementation of attention"
        return None

    def versions(self) -> list[tuple[int, int]]:
        """Address and number of changes in place of each of `parameters`."""
        return [(p.data_ptr(), p._version) for p in self.parameters]


def _configs(block: nn.Module) -> list[Any]:
    found = {id(c): c for m in block.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    return list(found.values())


def _plain(value: Any) -> bool:
    """Whether a value can be compared, and holds no tensors."""
    if value is None or isinstance(value, bool | int | float | str):
        return value == value
    if isinstance(value, dict):
        return all(_plain(key) and _plain(one) for key, one in value.items())
    return isinstance(value, list | tuple | set | frozenset) and all(_plain(one) for one in value)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_copied(one) for one in value)
    return value
