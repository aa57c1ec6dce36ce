"""Launching a Triton kernel with little Python.

`kernel[grid](...)` looks at every argument, builds a key of all of them and finds the compiled kernel, which takes
several times as long as the launch itself; a training step makes thousands of launches, and small batches wait for
them. `Launcher` keeps the compiled kernels under a key of its own and launches those, as Triton's tutorials do with the
result of `warmup`.
"""

from __future__ import annotations

from typing import Any

import torch

from .tiles import INTERPRETED


class Launcher:
    """A kernel and its compiled versions.

    What Triton specialises on is in the key: dtypes and 16-byte alignment of tensors, which arguments are None, which
    integers are 1, divisible by 16, or wider than 32 bits, all constants, and the device.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[tuple, Any] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any, warps: int = 4, **constants: Any) -> None:
        """Launch on the current device and stream; `constants` in the order of the kernel's signature."""
        if INTERPRETED.value:
            self.kernel[grid](*args, **constants)
            return
        key: list[Any] = [torch.cuda.current_device(), warps, *constants.values()]
        for arg in args:
            if arg is None:
                key.append(None)
            elif isinstance(arg, torch.Tensor):
                key.append((arg.dtype, arg.data_ptr() % 16 == 0))
            elif isinstance(arg, int):
                key.append(1 if arg == 1 else (arg % 16 == 0, arg < 1 << 31))
            else:
                key.append(float)
        compiled = self.compiled.get(tuple(key))
        if compiled is None:
            self.compiled[tuple(key)] = self.kernel[grid](*args, **constants, num_warps=warps)
        else:
            compiled[(*grid, 1, 1)](*args, *constants.values())


def launched(kernel: Any) -> Launcher:
    """Decorator over `triton.jit`."""
    return Launcher(kernel)
