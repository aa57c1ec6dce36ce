"""Counting live tensor bytes, to prove that something is done layer by layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation returns until it is freed.

    Attributes:
        now, peak: bytes of the storages alive; `peak` since the mode was entered.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = 0
        for tensor in known:
            self._add(tensor)
        self.start = self.peak = self.now

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in self._alive:
            self._alive[reference.cdata] = (reference, storage.nbytes())
            self.now += storage.nbytes()

    def sweep(self) -> None:
        """Forget what was freed."""
        for cdata, (reference, nbytes) in list(self._alive.items()):
            if reference.expired():
                del self._alive[cdata]
                self.now -= nbytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._add(leaf)
        if self.now > self.peak:  # only then does it matter what was freed meanwhile, and looking takes its time
            self.sweep()
            self.peak = max(self.peak, self.now)
        return result
