"""Launching a Triton kernel with little Python.

`kernel[grid](...)` looks at every argument, builds a key of all of them and finds the compiled kernel, which takes
several times as long as the launch itself; a training step makes thousands of launches, and small batches wait for
them. `Launcher` keeps the compiled kernels under a key of its own and calls their launch functions, as Inductor does.
"""

from __future__ import annotations

from typing import Any

import torch

from .tiles import INTERPRETED

_Tensor = torch.Tensor


class Launcher:
    """A kernel and its compiled versions.

    What Triton specialises on is in the key: dtypes and 16-byte alignment of tensors, the values of everything else
    but floats (which may change from step to step), and the device.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[tuple, Any] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any, warps: int = 4, fused: bool = True, **constants: Any) -> None:
        """Launch on the current device and stream; `constants` in the order of the kernel's signature.

        Args:
            fused: whether a product and a sum may be contracted to one operation with one rounding.
        """
        if INTERPRETED.value:
            for place, arg in enumerate(args):  # kernels compute addresses themselves
                assert not isinstance(arg, _Tensor) or arg.is_contiguous(), f"{self.kernel}: argument {place} has gaps"
            self.kernel[grid](*args, **constants)
            return
        device = torch.cuda.current_device()
        types = [
            (arg.dtype if arg.data_ptr() & 15 == 0 else (arg.dtype,))
            if isinstance(arg, _Tensor)
            else float
            if type(arg) is float
            else arg
            for arg in args
        ]
        values = constants.values()
        key = (device, grid, warps, fused, *values, *types)
        found = self.compiled.get(key)
        if found is None:
            compiled = self.kernel[grid](*args, **constants, num_warps=warps, enable_fp_fusion=fused)
            # no metadata for, and no calls of, Triton's launch hooks: they cost more than the launch
            after_stream = (compiled.function, compiled.packed_metadata, None, None, None)
            self.compiled[key] = compiled.run, (*grid, 1, 1)[:3], after_stream
        else:
            run, blocks, after_stream = found
            run(*blocks, torch._C._cuda_getCurrentRawStream(device), *after_stream, *args, *values)


def launched(kernel: Any) -> Launcher:
    """Decorator over `triton.jit`."""
    return Launcher(kernel)
