"""What a CUDA graph of a block depends on beside its inputs, and what in a block a graph could not repeat.

A replay runs kernels on addresses. It runs no Python: no hook, no branch on `training` or on the active adapter, no
draw of a random number on the CPU. So a graph holds as long as everything that Python would have looked at is as it was
while it was recorded: modules, the addresses of their tensors, and their plain attributes.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from . import kv_cache

#: Attributes of nn.Module that are watched in another way, or not at all.
_MODULE = {*vars(nn.Module()), "_gradient_checkpointing_func", "gradient_checkpointing"} - {"training"}
#: Where nn.Module keeps hooks that a forward or a backward runs.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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
        kept = [(part, value) for part, value in vars(module).items() if isinstance(value, torch.Tensor)]
        registered = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for part, tensor in (*registered, *kept):
            place = f"{name}.{part}".lstrip(".")
            devices.setdefault(tensor.device, place)
            if hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id"):
                return f"{place!r} is sharded over processes (FSDP, DeepSpeed, tensor parallelism)"
            if tensor.requires_grad and type(tensor) is not nn.Parameter and not _parts(tensor):
                return f"{place!r}, which is trained, is a {type(tensor).__name__}, whose values lie elsewhere"
    if len(devices) > 1:
        found = ", ".join(f"{place!r} on {device}" for device, place in devices.items())
        return f"its tensors lie on several devices: {found}"
    return None


def _parts(tensor: torch.Tensor) -> tuple[str, ...]:
    """The attributes that hold what a forward reads of a tensor without memory of its own, such as packed codes."""
    return getattr(type(tensor), "read_in_forward", ())


def in_parts(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no memory of its own, as packed codes that read as a weight."""
    return bool(_parts(tensor))


def _memory_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in whose memory a tensor's values lie."""
    return [part for name in _parts(tensor) if isinstance(part := getattr(tensor, name), torch.Tensor)] or [tensor]


def stand_in(parameter: nn.Parameter) -> nn.Parameter:
    """Make a parameter of the same values in the same memory, without hooks."""
    made = nn.Parameter(parameter.detach())
    for name in _parts(parameter):
        setattr(made, name, getattr(parameter, name))
    return made


def _hooks(module: nn.Module) -> Iterator[Any]:
    for kind in _HOOKS:
        yield from (hook for hook in getattr(module, kind).values() if hook not in kv_cache.HOOKS)


class _Entries:
    """Values in dictionaries, by key: so many that looking at them is left to C."""

    def __init__(self) -> None:
        self._tables: list[dict] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._names: list[str] = []

    def add(self, table: dict, key: Any, value: Any, name: str) -> None:
        self._tables.append(table)
        self._keys.append(key)
        self._values.append(value)
        self._names.append(name)

    def replaced(self) -> Iterator[tuple[Any, Any, str]]:
        """What was there, what is there now, and its name, where these are two objects."""
        if all(map(operator.is_, map(dict.get, self._tables, self._keys), self._values)):
            return
        for table, key, value, name in zip(self._tables, self._keys, self._values, self._names, strict=True):
            if (found := table.get(key)) is not value:
                yield value, found, name

    def different(self) -> str | None:
        """The name of the first that is not equal to what was there."""
        with contextlib.suppress(RuntimeError, TypeError, ValueError):  # of tensors that are there now
            if list(map(dict.get, self._tables, self._keys)) == self._values:
                return None
        for table, key, value, name in zip(self._tables, self._keys, self._values, self._names, strict=True):
            if not _plain(found := table.get(key)) or found != value:
                return name
        return None


class BlockState:
    """A block as it is now.

    Attributes:
        parameters: those that need gradients.
    """

    def __init__(self, block: nn.Module) -> None:
        self._objects, self._containers = _Entries(), _Entries()
        self._tensors: list[tuple[torch.Tensor, str]] = []
        self._memory: list[tuple[torch.Tensor, str]] = []  # what has an address, of these
        self._sized: list[tuple[Any, str]] = []  # containers
        self._hooks: list[tuple[dict, Any, Any, str]] = []
        self.parameters: list[nn.Parameter] = []
        self._places: list[tuple[dict, Any, int]] = []  # dictionary, key, number among `parameters`
        for name, module in block.named_modules():
            self._watch(module, f"{name}." if name else "", name or "the block")
        self._layout = [(config, config._attn_implementation) for config in _configs(block)]
        self._addresses = [tensor.data_ptr() for tensor, _ in self._memory]
        self._trained = [t for p in self.parameters for t in _memory_of(p)]
        self._needs = [tensor.requires_grad for tensor, _ in self._tensors]
        self._sized_ones = [container for container, _ in self._sized]
        self._lengths = list(map(len, self._sized_ones))

    def _watch(self, module: nn.Module, inside: str, name: str) -> None:
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                self._objects.add(table, key, tensor, inside + key)
                if tensor is not None:
                    self._watch_tensor(tensor, inside + key)
                if tensor is not None and tensor.requires_grad:
                    self._places.append((table, key, self._number(tensor)))
        for key, child in module._modules.items():
            self._objects.add(module._modules, key, child, inside + key)
        for table in (getattr(module, kind) for kind in _HOOKS):
            self._sized.append((table, f"hooks of {name}"))
            self._hooks += [(table, key, hook, f"hooks of {name}") for key, hook in table.items()]
        attributes = vars(module)
        self._sized.append((attributes, f"attributes of {name}"))
        for key, value in attributes.items():
            if key in _MODULE:
                continue
            if isinstance(value, torch.Tensor):
                self._watch_tensor(value, inside + key)
            if isinstance(value, dict | list | set) and _plain(value):
                self._containers.add(attributes, key, _copied(value), inside + key)
            else:
                self._objects.add(attributes, key, value, inside + key)

    def _watch_tensor(self, tensor: torch.Tensor, name: str) -> None:
        self._tensors.append((tensor, name))
        self._memory += [(one, name) for one in _memory_of(tensor)]
        for part in _parts(tensor):
            self._objects.add(vars(tensor), part, getattr(tensor, part), f"{name}.{part}")

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
        for value, found, name in self._objects.replaced():
            if not (_plain(value) and _plain(found) and type(found) is type(value) and found == value):
                return name
        if (different := self._containers.different()) is not None:
            return different
        now: list[Any] = [tensor.data_ptr() for tensor, _ in self._memory]
        if now != self._addresses:
            return _first_other(now, self._addresses, self._memory)
        now = [tensor.requires_grad for tensor, _ in self._tensors]
        if now != self._needs:
            return _first_other(now, self._needs, self._tensors)
        now = list(map(len, self._sized_ones))
        if now != self._lengths:
            return _first_other(now, self._lengths, self._sized)
        for table, key, hook, name in self._hooks:
            if table.get(key) is not hook:
                return name
        for config, implementation in self._layout:
            if config._attn_implementation != implementation:
                return "the implementation of attention"
        return None

    def versions(self) -> list[tuple[int, int]]:
        """Address and number of changes in place of all that `parameters` consist of."""
        return [(t.data_ptr(), t._version) for t in self._trained]


def _first_other(now: list[Any], before: list[Any], named: list[tuple[Any, str]]) -> str:
    """The name of the first that differs."""
    return next(name for one, other, (_, name) in zip(now, before, named, strict=True) if one != other)


def _configs(block: nn.Module) -> list[Any]:
    found = {id(c): c for m in block.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    return list(found.values())


def _plain(value: Any) -> bool:
    """Whether a value can be compared, and holds no tensors."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return True
    if isinstance(value, dict):
        return all(_plain(key) and _plain(one) for key, one in value.items())
    return isinstance(value, list | tuple | set | frozenset) and all(_plain(one) for one in value)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_copied(one) for one in value)
    return value
