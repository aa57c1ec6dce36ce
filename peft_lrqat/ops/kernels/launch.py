"""Launching a Triton kernel with little Python.

`kernel[grid](...)` looks at every argument, builds a key of all of them and finds the compiled kernel, which takes
several times as long as the launch itself; a training step makes thousands of launches, and small batches wait for
them. Here everything but the tensors is fixed once for each geometry (`Kernel.launch`, which the callers cache), and a
`Launch` calls the compiled kernel's own function, as Inductor does.

That function is no interface of Triton's, and takes everything by position: in another order it would take a pointer
for a size. So it is called only where its order is known (`takes_known_order`), and with addresses in the place of
tensors, as those versions allow; elsewhere every launch is `kernel[grid](...)`.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import triton

from .tiles import INTERPRETED

#: The versions whose sources were read. In all of them `JITFunction.run` ends in
#: `kernel.run(x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments)`.
_VERSIONS_READ = ("3.6", "3.7", "3.8", "3.9")

#: The parameters of the launchers there (`CudaLauncher.__call__`): of 3.6, which hands the rest on, and of later ones.
_PARAMETERS_READ = (
    ("gridX", "gridY", "gridZ", "stream", "function", "args"),
    (
        "gridX",
        "gridY",
        "gridZ",
        "stream",
        "function",
        "kernel_metadata",
        "launch_metadata",
        "launch_enter_hook",
        "launch_exit_hook",
        "args",
    ),
)


@functools.cache
def takes_known_order(launcher: type) -> bool:
    """Tell whether a compiled kernel's launcher is one that `Launch` may call with positional arguments.

    Args:
        launcher: the class of `CompiledKernel.run`.

    Returns:
        True if Triton's version is one that was read, and the launcher has the parameters that were read.
    """
    if ".".join(triton.__version__.split(".")[:2]) not in _VERSIONS_READ:
        return False
    try:
        return tuple(inspect.signature(launcher.__call__).parameters)[1:] in _PARAMETERS_READ
    except ValueError:  # written in C, without a signature
        return False


class Launch:
    """A kernel with everything but its tensors, and what was compiled for them.

    What else Triton specialises on: dtypes, 16-byte alignment, which tensors are None, and the device.
    """

    __slots__ = ("blocks", "compiled", "constants", "grid", "kernel", "options", "rest", "scalars")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], scalars: tuple, options: dict[str, Any], constants: dict[str, Any]
    ) -> None:
        self.kernel, self.grid, self.options = kernel, grid, options
        self.scalars, self.constants = scalars, constants
        self.rest = (*scalars, *constants.values())
        self.blocks = (*grid, 1, 1)[:3]
        self.compiled: dict[tuple, tuple] = {}  # filled where `takes_known_order`

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Launch on the current device and stream. Tensors have no gaps: kernels compute addresses themselves."""
        if INTERPRETED.value:
            for place, tensor in enumerate(tensors):
                assert tensor is None or tensor.is_contiguous(), f"{self.kernel}: argument {place} has gaps"
            self.kernel[self.grid](*tensors, *self.scalars, **self.constants)
            return
        device = torch._C._cuda_getDevice()
        known: list[Any] = [device]
        pointers: list[int | None] = []  # the launcher would ask each tensor again, and then the driver
        for tensor in tensors:
            if tensor is None:
                known.append(None)
                pointers.append(None)
            else:
                pointer = tensor.data_ptr()
                known.append(tensor.dtype if pointer & 15 == 0 else (tensor.dtype,))
                pointers.append(pointer)
        key = tuple(known)
        found = self.compiled.get(key)
        if found is None:
            compiled = self.kernel[self.grid](*tensors, *self.scalars, **self.constants, **self.options)
            launcher: Any = type(compiled.run)
            if takes_known_order(launcher):
                # no metadata for, and no calls of, Triton's launch hooks: they cost more than the launch
                self.compiled[key] = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)
        else:
            run, after_stream = found
            run(*self.blocks, torch._C._cuda_getCurrentRawStream(device), *after_stream, *pointers, *self.rest)


class Kernel:
    """A jitted function whose arguments are tensors, then scalars, then constants."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def launch(
        self, grid: tuple[int, ...], *scalars: int | float, warps: int = 4, fused: bool = True, **constants: Any
    ) -> Launch:
        """Fix everything but the tensors. A `Launch` compiles (or finds what Triton keeps) at its first call: cache it.

        Args:
            grid: numbers of programs.
            scalars: in the order of the kernel's signature, as `constants` are.
            fused: whether a product and a sum may be contracted to one operation with one rounding.
        """
        # they are passed by position once the kernel is compiled
        assert self.kernel.arg_names[-len(constants) :] == [*constants], f"{self.kernel}: {[*constants]}"
        return Launch(self.kernel, grid, scalars, {"num_warps": warps, "enable_fp_fusion": fused}, constants)


def without_gaps(x: torch.Tensor) -> tuple[torch.Tensor, list[int] | None]:
    """Return a tensor as kernels take it, and how its dimensions were reordered for that; None: they were not.

    Rows of the last dimension stay whole. Keys and values lie in memory token by token, not head by head: to walk
    through them in that order spares a copy. `in_order_of` makes the shape of what was computed that of x.
    """
    if x.is_contiguous():
        return x, None
    last = x.dim() - 1
    order = [*sorted(range(last), key=lambda dim: -x.stride()[dim]), last]
    moved = x.permute(order)
    return (moved, order) if moved.is_contiguous() else (x.contiguous(), None)


def in_order_of(out: torch.Tensor, order: list[int] | None) -> torch.Tensor:
    """Undo the reordering of `without_gaps`."""
    return out if order is None else out.permute([order.index(dim) for dim in range(len(order))])


def launched(kernel: Any) -> Kernel:
    """Wrap a function that `triton.jit` made: a decorator."""
    return Kernel(kernel)
