"""How vLLM rounds keys and values as it writes them to its cache. The reference of `kernels/cache.py`.

Its operations are those of its kernels, in their order, in fp32. Quotients are of tensors: torch makes products of
quotients by numbers on a GPU, which are other numbers than a CPU's.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def rounded_states(states: Tensor, bits: int) -> Tensor:
    """Compute what `round_states` returns by vLLM's rule. The reference of the kernel.

    Args:
        states: (..., head size), any float dtype.
        bits: 8 or 4.

    Returns:
        The same shape and dtype.
    """
    if not states.numel():
        return states.clone()
    return _int8(states) if bits == 8 else _int4(states)


def rotated_together(size: int) -> int:
    """How many consecutive numbers of a head of this size vLLM rotates together: the largest power of two in it."""
    return size & -size


@lru_cache(maxsize=16)
def rotation_signs(size: int, device: torch.device) -> Tensor:
    """Return the signs of vLLM's rotation, fp32 (size,): drawn with its own seed."""
    with torch.device("cpu"):  # whatever torch.set_default_device says
        generator = torch.Generator().manual_seed(0x9E3779B9)
        return (2.0 * torch.bernoulli(torch.full((size,), 0.5, dtype=torch.float32), generator=generator) - 1.0).to(
            device
        )


def _half_away(x: Tensor) -> Tensor:
    """Round to whole numbers as the kernels do: add a half to the magnitude, and cut."""
    return torch.where(x >= 0, x + 0.5, x - 0.5).trunc()


def _int8(states: Tensor) -> Tensor:
    # `_reshape_cache_per_token_head`
    x = states.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / x.new_full((), 127.0)).clamp(min=1e-6)
    return (_half_away(x * (1.0 / scale)).clamp(-128, 127) * scale).to(states.dtype)


def _int4(states: Tensor) -> Tensor:
    # `reshape_and_cache_int4`; the zero point takes the last four bits of the scale's mantissa
    block = rotated_together(states.shape[-1])
    signs = rotation_signs(block, states.device)
    x = _hadamard(states.float().unflatten(-1, (-1, block)) * signs).flatten(-2).to(states.dtype).float()
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    scale = ((high - low) / x.new_full((), 15.0)).clamp(min=1e-6)
    zero = _half_away(-low / scale).clamp(0, 15)
    levels = _half_away(x * (1.0 / scale) + zero).clamp(0, 15)
    stored = (scale.view(torch.int32) & -16).view(torch.float32)
    back = _hadamard(((levels - zero) * stored).unflatten(-1, (-1, block))) * signs / block
    return back.flatten(-2).to(states.dtype)


def _hadamard(x: Tensor) -> Tensor:
    """Multiply each row by Sylvester's matrix, whose size is a power of two: (..., size), not normalized.

    By sums and differences: a product of matrices would add up in another order for another number of rows, and in
    fewer bits under autocast.
    """
    x, size, half = x.contiguous(), x.shape[-1], 1
    while half < size:
        pairs = x.unflatten(-1, (-1, 2, half))
        sums = torch.empty_like(pairs)
        torch.add(pairs[..., 0, :], pairs[..., 1, :], out=sums[..., 0, :])
        torch.sub(pairs[..., 0, :], pairs[..., 1, :], out=sums[..., 1, :])
        x, half = sums.flatten(-3), 2 * half
    return x
