"""Values that were computed for reading, and are no place to write to.

A weight that is stored as packed integers is built when somebody asks for it, and so is every view of it. What is
written there would change a temporary, and nobody would notice. A `ReadOnlyTensor` says so instead. Reading it in any
operation gives plain tensors; views of it are read-only again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class ReadOnlyTensor(torch.Tensor):
    """A tensor that raises a RuntimeError when it is written to, however that is done."""

    _plain: torch.Tensor
    _why: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's docs do it

    @staticmethod
    def __new__(cls, values: torch.Tensor, why: str) -> ReadOnlyTensor:
        """
        Args:
            values: a plain tensor; its storage is shared, for reading.
            why: what the error says after the name of the operation: the reason, and what to do.
        """
        self = torch.Tensor._make_subclass(cls, values)
        self._plain, self._why = values, why
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def _refuse(self, name: str, *args: Any) -> Any:
        raise RuntimeError(f"`{name}` would be lost. {self._why}")

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        self._refuse("data =")

    # What torch does without dispatching it.

    def apply_(self, *args: Any) -> Any:
        self._refuse("apply_")

    def map_(self, *args: Any) -> Any:
        self._refuse("map_")

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array."""
        if self.requires_grad and not force:
            return super().numpy()  # torch's error
        array = self._plain.numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy().__array__(*args, **kwargs)

    def tolist(self) -> Any:
        return self._plain.tolist()

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._plain.clone().__dlpack__(**kwargs)

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        return self._plain.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain.clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]  # stub lacks cls
        kwargs = kwargs or {}
        for written in arguments_written(func, args, kwargs):
            if isinstance(written, ReadOnlyTensor):
                written._refuse(func._schema.name.split("::")[-1])
        why = next(t._why for t in _tensors((args, kwargs)) if isinstance(t, ReadOnlyTensor))
        args, kwargs = tree_map_only(ReadOnlyTensor, lambda tensor: tensor._plain, (args, kwargs))
        return views_of(func, func(*args, **kwargs), why)


def views_of(func: Any, result: Any, why: str) -> Any:
    """The result of an operation on values that were built for reading: read-only where it is a view of them."""
    if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
        return result
    return tree_map_only(torch.Tensor, lambda t: ReadOnlyTensor(t, why) if type(t) is torch.Tensor else t, result)


def arguments_written(func: Any, args: tuple, kwargs: dict) -> Iterator[Any]:
    """The tensors that an operation (an `OpOverload`) writes to in place."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from value if isinstance(value, (list, tuple)) else [value]
    if func.namespace == "c10d" and func._schema.name.endswith("_"):  # collectives, whose schemas do not say so
        if func._schema.name == "c10d::broadcast_" and torch.distributed.ProcessGroup.unbox(args[1]).rank() == args[2]:
            return  # it sends
        yield from _tensors(args[0])


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for leaf in torch.utils._pytree.tree_leaves(values):
        if isinstance(leaf, torch.Tensor):
            yield leaf
