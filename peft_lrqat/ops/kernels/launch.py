"""Launching a Triton kernel with little Python.

`kernel[grid](...)` looks at every argument, builds a key of all of them and finds the compiled kernel, which takes
several times as long as the launch itself; a training step makes thousands of launches, and small batches wait for
them. Here everything but the tensors is fixed once for each geometry (`Kernel.launch`, which the callers cache), and a
`Launch` calls the compiled kernel's own function, as Inductor does.
"""

from __future__ import annotations

from typing import Any

import torch

from .tiles import INTERPRETED


class Launch:
    """A kernel with everything but its tensors, and what was compiled for them.

    What Triton specialises on beside: dtypes, 16-byte alignment, which tensors are None, and the device.
    """

    __slots__ = ("blocks", "compiled", "constants", "grid", "kernel", "options", "rest", "scalars")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], scalars: tuple, options: dict[str, Any], constants: dict[str, Any]
    ) -> None:
        self.kernel, self.grid, self.options = kernel, grid, options
        self.scalars, self.constants = scalars, constants
        self.rest = (*scalars, *constants.values())
        self.blocks = (*grid, 1, 1)[:3]
        self.compiled: dict[tuple, tuple] = {}

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Launch on the current device and stream. Tensors have no gaps: kernels compute addresses themselves."""
        if INTERPRETED.value:
            for place, tensor in enumerate(tensors):
                assert tensor is None or tensor.is_contiguous(), f"{self.kernel}: argument {place} has gaps"
            self.kernel[self.grid](*tensors, *self.scalars, **self.constants)
            return
        device = torch._C._cuda_getDevice()
        key = (
            device,
            *[None if t is None else (t.dtype if t.data_ptr() & 15 == 0 else (t.dtype,)) for t in tensors],
        )
        found = self.compiled.get(key)
        if found is None:
            compiled = self.kernel[self.grid](*tensors, *self.scalars, **self.constants, **self.options)
            # no metadata for, and no calls of, Triton's launch hooks: they cost more than the launch
            self.compiled[key] = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)
        else:
            run, after_stream = found
            run(*self.blocks, torch._C._cuda_getCurrentRawStream(device), *after_stream, *tensors, *self.rest)


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


def launched(kernel: Any) -> Kernel:
    """Decorator over `triton.jit`."""
    return Kernel(kernel)
