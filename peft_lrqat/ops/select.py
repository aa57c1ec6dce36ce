"""Which code runs an operation: Triton's kernels where a tensor is on a GPU that has them, the references elsewhere."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

import torch

#: None: kernels where they run; False: references everywhere; True: kernels everywhere (Triton's interpreter).
_FORCED: ContextVar[bool | None] = ContextVar("use_kernels", default=None)


@functools.cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from . import kernels

    return kernels


@functools.cache
def _capable(device: torch.device) -> bool:
    """Whether Triton compiles for this GPU: NVIDIA's from Ampere on (bf16), and AMD's."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def kernels_for(tensor: torch.Tensor) -> ModuleType | None:
    """The module `ops.kernels` if it is to work on this tensor, else None."""
    forced = _FORCED.get()
    if forced is False or (forced is None and (tensor.device.type != "cuda" or not _capable(tensor.device))):
        return None
    return _kernels()


@contextlib.contextmanager
def use_kernels(use: bool) -> Iterator[None]:
    """Inside, operations run with (True) or without (False) the Triton kernels, whatever the device.

    True needs a GPU or Triton's interpreter (`TRITON_INTERPRET=1`); results differ by rounding only, codes not at all.
    """
    token = _FORCED.set(use)
    try:
        yield
    finally:
        _FORCED.reset(token)


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """A kernel goes to the current device; this makes it the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
