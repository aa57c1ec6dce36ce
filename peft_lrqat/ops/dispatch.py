"""Which code runs an operation: Triton's kernels where a tensor is on a GPU that has them, the references elsewhere."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import torch

#: None: kernels where they run; False: references everywhere; True: kernels everywhere (Triton's interpreter). One for
#: all threads: autograd runs backward, and what it recomputes, in a thread of its own.
_forced: bool | None = None


_NOTHING = contextlib.nullcontext()


@functools.cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from . import kernels

    return kernels


@functools.cache
def _capable(device: torch.device) -> bool:
    """Tell whether this is a GPU that the kernels were made for: NVIDIA's from Ampere on, which have bf16."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def kernels_for(tensor: torch.Tensor) -> ModuleType | None:
    """Choose for a tensor: the module `ops.kernels`, or None where the reference is to work on it."""
    if _forced is False or (_forced is None and not (tensor.is_cuda and _capable(tensor.device))):
        return None
    return _kernels()


@contextlib.contextmanager
def use_kernels(use: bool) -> Iterator[None]:
    """Run operations with or without the Triton kernels inside a `with` block, whatever the device, in all threads.

    Results differ by rounding only, and codes not at all.

    Args:
        use (bool): True: with the kernels, which need a GPU or Triton's interpreter (`TRITON_INTERPRET=1`). False: with
            the plain PyTorch references.

    Returns:
        A context manager, without a value.

    Examples:
        >>> from peft_lrqat.ops import use_kernels
        >>> with use_kernels(False):
        ...     logits = model(**tokenizer("The quick", return_tensors="pt")).logits
    """
    global _forced
    before, _forced = _forced, use
    try:
        yield
    finally:
        _forced = before


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which the tensor's device is the current one, where kernels are launched."""
    if not tensor.is_cuda or tensor.get_device() == torch._C._cuda_getDevice():
        return _NOTHING
    return torch.cuda.device(tensor.device)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast to a dtype. `tensor.to(dtype)` takes a microsecond where there is nothing to do, which is nearly always."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def in_autocast_dtype(x: torch.Tensor) -> torch.Tensor:
    """Cast `x` to the dtype that autocast computes in, as torch's own linear layer does; without autocast return `x`.

    Every layer does so first (`inputs.py`), and so rounds and multiplies alike under autocast before and after merging.
    """
    return cast(x, autocast_dtype(x))


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """Tell what `in_autocast_dtype` casts to."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def no_autocast(tensor: torch.Tensor, only: torch.dtype | None = None) -> contextlib.AbstractContextManager:
    """Return the context that an operation works in: no autocast, and the tensor's device as the current one.

    Leaving autocast costs as much as a launch, so that is done only where it is on and would change something.

    Args:
        only: the dtype of all that the operation multiplies through torch, where it is one. Autocast to it changes
            nothing.
    """
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == only:
        return on_device_of(tensor)
    stack = contextlib.ExitStack()
    stack.enter_context(torch.autocast(kind, enabled=False))
    stack.enter_context(on_device_of(tensor))
    return stack


def refuse_transforms() -> None:
    """Raise RuntimeError where `torch.jit.trace` or a transform of `torch.func` runs, which build no W^ from integers.

    The first would fail somewhere inside, the second with advice for whoever writes operations.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._is_tracing():
        raise RuntimeError(
            "A layer on a grid cannot be recorded by `torch.jit.trace` (nor by torch.onnx.export with `dynamo=False`). "
            "`torch.export.export` can; for an engine, write the format that it reads (`peft_lrqat.export`)."
        )
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "A layer on a grid has no rule for functorch transforms (`torch.func.grad`, `vmap`, `jvp`, `jacrev`): its "
            "rounded weight is built outside of the graph. Use `backward()` or `torch.autograd.grad`, a loop in place "
            "of `vmap`, or leave the layers float (`exclude_modules`). `torch.func.functional_call` works."
        )


_WITHOUT_GRAPH = (
    "a layer on a grid does not have: its rounded weight is built outside of the graph",
    "leave the layers that they go through float (`exclude_modules`)",
)


def refuse_second_derivatives(lack: str = _WITHOUT_GRAPH[0], instead: str = _WITHOUT_GRAPH[1]) -> None:
    """For backward: raise RuntimeError if it is recorded (`create_graph=True`), because W^ is built without a graph.

    It cannot wait until the second derivative is taken: with named inputs (`autograd.grad`, `backward(inputs=...)`)
    torch never comes to the node that would raise, and leaves that part out.

    Args:
        lack: who has no second derivatives, as the message goes on.
        instead: what can be done, besides training without them.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"`create_graph=True` asks for second derivatives (a gradient penalty, a Hessian), which {lack}. Train "
            f"without them, or {instead}."
        )
