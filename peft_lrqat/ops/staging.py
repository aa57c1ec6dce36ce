"""Bases that lie in the CPU's memory, and are copied to the device for their turn (`offload_base`).

The operations take a base, its scales and its zero points wherever they lie, and ask `staged` for them where they are
worked on. For tensors that a `Schedule` knows, that is one of two buffers on the device, each large enough for the
layers of one block of the model. So what autograd and checkpointing keep for backward is the CPU's tensor, and nothing
that is written over later ever leaves an operation.

    forward     block 0   1   2   ...   n       computes with the buffer of its block, while the other buffer is filled
    backward    block n   n-1 ...   1   0       with the next one: the one before within a backward, else the one after

A block of the model is what gradient checkpointing computes again. So its layers are copied once for forward, and once
for recomputing and backward together; the last block of a forward, and the one before it, are still there when backward
begins, as the first two are for the next step. The order decides about speed alone: a layer that comes out of turn is
copied then, and its operation waits.

Copies run on a stream of their own, from pinned memory. A copy into a buffer waits for what has been asked to read the
buffer before, on any stream, and who reads a buffer waits for the copy. On a CPU everything is the same but the stream.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

#: What a block's tensors begin at multiples of, in a buffer: bytes.
_ALIGNMENT = 256

Stored = tuple[Tensor, Tensor, Tensor | None]  # base, scale0 and zero point, as the operations take them


def versions(tensors: Sequence[Tensor | None]) -> list[int | None]:
    """Tell how often each tensor was changed in place; None for inference tensors (several adapters add up to one under
    `torch.inference_mode`), which do not count."""
    return [None if t is None or t.is_inference() else t._version for t in tensors]


def staged(
    base: Tensor, scale0: Tensor, zero_point: Tensor | None, near: Tensor | None = None
) -> contextlib.AbstractContextManager[Stored]:
    """Return a context with these tensors where they are worked on. They are not defined after it.

    Args:
        near: a tensor that lies there, for tensors that no schedule knows; None: those are where they are.
    """
    held = _HELD.get(base.data_ptr()) if _HELD else None
    schedule = None if held is None else held.schedule()
    if held is not None and schedule is not None:
        return schedule.use(held, (base, scale0, zero_point))
    if near is not None and near.device != base.device:  # what hooks of saved tensors have copied
        return contextlib.nullcontext(_moved((base, scale0, zero_point), near.device))
    return contextlib.nullcontext((base, scale0, zero_point))


def in_memory(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor in the CPU's memory, from which it can be copied to `device` while that computes."""
    pin = device.type not in ("cpu", "meta")
    if tensor.device.type == "cpu" and (not pin or tensor.is_pinned()):
        return tensor
    with torch.inference_mode(False):
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin).copy_(tensor)


class Schedule:
    """The layers of a model whose bases lie in the CPU's memory, by its blocks, in the order in which they run.

    A copy of a model gets one of its own, which is empty until its layers are used.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, dict[str, _Held]] = {}
        self._buffers: dict[torch.device, _Buffers] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Schedule, ()

    def knows(self, block: int, name: str, tensors: Stored, device: torch.device) -> bool:
        """Whether `hold` was called with these very tensors, and by no other schedule since."""
        known = self._blocks.get(block, {}).get(name)
        if known is None or known.device != device or not known.holds(tensors):
            return False
        return _HELD.get(tensors[0].data_ptr()) is known

    def hold(self, block: int, name: str, tensors: Stored, device: torch.device) -> None:
        """Take note of a layer's tensors.

        Args:
            block: where in the model it is, from 0.
            name: of the layer.
            device: where it computes.
        """
        known = self._blocks.get(block, {}).get(name)
        if known is not None and known.device != device:
            self._buffers.pop(known.device, None)
        held = _Held(self, block, tensors, device)
        self._blocks.setdefault(block, {})[name] = held
        _HELD[tensors[0].data_ptr()] = held

    @contextlib.contextmanager
    def use(self, held: _Held, given: Stored) -> Iterator[Stored]:
        """The tensors of a layer in a buffer; while they are used, the other one is filled with the next block."""
        buffers = self._buffers.get(held.device)
        if buffers is None:
            buffers = self._buffers.setdefault(held.device, _Buffers(held.device))
        buffers.copies.refuse_capture()
        with buffers.lock:
            buffer = buffers.find(held) or buffers.fill(held.block, self._on(held.block, held.device), self._largest)
            buffers.wait_for(buffer)
            following = held.block + (-1 if _in_backward() else 1)
            if not buffers.has(following) and (layers := self._on(following, held.device)):
                buffers.fill(following, layers, self._largest)
            try:
                yield held.select(given, buffer.tensors[held])
            finally:
                buffers.used(buffer)

    def _on(self, block: int, device: torch.device) -> list[_Held]:
        """The layers of a block that compute on a device."""
        return [held for held in self._blocks.get(block, {}).values() if held.device == device]

    def _largest(self) -> int:
        """Bytes of the largest block."""
        return max(sum(held.size for held in layers.values()) for layers in self._blocks.values())


class _Held:
    """The tensors of one layer in the CPU's memory. Holding them keeps their addresses from being used again."""

    def __init__(self, schedule: Schedule, block: int, tensors: Stored, device: torch.device) -> None:
        self.schedule = weakref.ref(schedule)
        self.block, self.device = block, device
        self.tensors: Stored = tuple(None if t is None else t.detach() for t in tensors)  # type: ignore[assignment]
        self.sizes = [0 if t is None else -(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in tensors]
        self.size = sum(self.sizes)

    def holds(self, tensors: Stored) -> bool:
        return all(_same(mine, other) for mine, other in zip(self.tensors, tensors, strict=True))

    def select(self, given: Stored, copies: Stored) -> Stored:
        """The copies of these tensors, as far as they are the layer's own."""
        if self.holds(given):
            return copies
        found = [
            copy if _same(mine, t) else t if t is None else t.to(self.device)
            for mine, t, copy in zip(self.tensors, given, copies, strict=True)
        ]
        return tuple(found)  # type: ignore[return-value]  # as many as were given

    def views_of(self, memory: Tensor, start: int) -> Stored:
        """Tensors like these, in a buffer from a byte on."""
        places = itertools.accumulate(self.sizes, initial=start)
        views = [
            None if t is None else memory[place : place + t.nbytes].view(t.dtype).view(t.shape)
            for t, place in zip(self.tensors, places, strict=False)
        ]
        return tuple(views)  # type: ignore[return-value]


#: The layers of all schedules, by the addresses of their bases.
_HELD: weakref.WeakValueDictionary[int, _Held] = weakref.WeakValueDictionary()


class _Buffer:
    """Memory on a device for the layers of one block."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.block: int | None = None
        self.tensors: dict[_Held, Stored] = {}
        self.versions: dict[_Held, list[int | None]] = {}
        self.copied: Any = None  # when it was filled
        self.read: dict[Any, Any] = {}  # stream -> up to when it reads it

    def has(self, held: _Held) -> bool:
        return held in self.tensors and self.versions[held] == versions(held.tensors)


class _Buffers:
    """The two buffers of a model on one device.

    Attributes:
        lock: held while one of them is used, or filled.
        copies: how they are filled.
    """

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        self.copies = copies_to(device)
        self._last, self._other = _Buffer(), _Buffer()  # used last, and before that

    def has(self, block: int) -> bool:
        return block in (self._last.block, self._other.block)

    def find(self, held: _Held) -> _Buffer | None:
        """The buffer with a layer's tensors as they are now."""
        return next((buffer for buffer in (self._last, self._other) if buffer.has(held)), None)

    def fill(self, block: int, layers: list[_Held], largest: Any) -> _Buffer:
        """Copy the layers of a block into the buffer that was used longer ago, or that has held the block already.

        Args:
            largest: tells how many bytes a block may need.
        """
        buffer = self._last if self._last.block == block else self._other
        size = sum(held.size for held in layers)
        buffer.block, buffer.tensors = None, {}  # until all is asked for: who interrupts leaves an empty buffer
        with torch.inference_mode(False):  # or it could not be written to later
            if buffer.memory is None or buffer.memory.numel() < size:
                buffer.memory = None
                buffer.memory = self.copies.memory(largest())
                self.used(buffer)
            starts = itertools.accumulate((held.size for held in layers), initial=0)
            memory = buffer.memory
            tensors = {held: held.views_of(memory, start) for held, start in zip(layers, starts, strict=False)}
            buffer.versions = {held: versions(held.tensors) for held in layers}
            pairs = [
                (there, here)
                for held, views in tensors.items()
                for there, here in zip(views, held.tensors, strict=True)
                if there is not None and here is not None
            ]
            buffer.copied = self.copies.copy(pairs, list(buffer.read.values()))
        buffer.block, buffer.tensors, buffer.read = block, tensors, {}
        return buffer

    def wait_for(self, buffer: _Buffer) -> None:
        """Have what is asked of the device from now on wait for a buffer; it is the one used last then."""
        if buffer is not self._last:
            self._last, self._other = buffer, self._last
        self.copies.wait_for(buffer.copied)

    def used(self, buffer: _Buffer) -> None:
        """Note that what was asked of the device until now reads a buffer."""
        buffer.read[self.copies.stream()] = self.copies.now()


class AtOnce:
    """Copies on a CPU, which has no streams: there is nothing to wait for."""

    def memory(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, pairs: list[tuple[Tensor, Tensor]], after: list[Any]) -> Any:
        for there, here in pairs:
            there.copy_(here)

    def wait_for(self, copied: Any) -> None:
        pass

    def refuse_capture(self) -> None:
        pass

    def stream(self) -> Any:
        return None

    def now(self) -> Any:
        return None


class BesideStream:
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._backend = device, torch.get_device_module(device)
        self._side = self._backend.Stream(device)

    def memory(self, size: int) -> Tensor:
        """Bytes that are not given to others, when they are free, before the copies into them have ended."""
        memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        memory.record_stream(self._side)
        return memory

    def copy(self, pairs: list[tuple[Tensor, Tensor]], after: list[Any]) -> Any:
        """Copy tensors to others, after some moments; returns when it is done."""
        with self._backend.stream(self._side):
            for moment in after:
                self._side.wait_event(moment)
            for there, here in pairs:
                there.copy_(here, non_blocking=True)
            return self._side.record_event()

    def wait_for(self, copied: Any) -> None:
        self.stream().wait_event(copied)

    def refuse_capture(self) -> None:
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "A CUDA graph is captured of a model with `offload_base=True`, whose copies from the CPU's memory a "
                "graph would repeat out of turn. Leave one of the two out."
            )

    def stream(self) -> Any:
        """The stream that computes."""
        return self._backend.current_stream(self._device)

    def now(self) -> Any:
        """When that has done what it was asked for until now."""
        return self.stream().record_event()


def copies_to(device: torch.device) -> AtOnce | BesideStream:
    """Choose how a device is copied to."""
    return AtOnce() if device.type == "cpu" else BesideStream(device)


def _in_backward() -> bool:
    """Whether autograd runs a backward in this thread, or computes a part of the forward again for one."""
    return torch._C._current_graph_task_id() != -1


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.device == other.device


def _moved(tensors: Stored, device: torch.device) -> Stored:
    return tuple(None if t is None else t.to(device) for t in tensors)  # type: ignore[return-value]
