"""Rounding a layer's input to 8 bits per token, as the checkpoint's engine will do it."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_activations(x: Tensor, levels: float) -> Tensor:
    """Per-token absmax activations on an 8-bit grid, straight-through (BitNet b1.58, arXiv 2402.17764).

    Args:
        x: (..., in), a token per row.
        levels: how many steps the largest magnitude of a token takes: 127 in BitNet, 127.5 in compressed-tensors.

    Returns:
        (..., in) in x's dtype: clip(round(x / a), -128, 127) * a with a = max |x| / levels.
    """
    with torch.no_grad():
        wide = x.float()
        largest = wide.abs().amax(dim=-1, keepdim=True)
        if levels == 127:  # the operations, in the order, of transformers' `ActQuant`
            scale = 127 / largest.clamp(min=1e-5)
            rounded = ((wide * scale).round().clamp(-128, 127) / scale).to(x.dtype)
        else:
            rounded = _compressed_tensors_activations(x, largest, levels)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def _compressed_tensors_activations(x: Tensor, largest: Tensor, levels: float) -> Tensor:
    # compressed-tensors keeps the scale in the activations' dtype, and computes in it
    scale = (largest / levels).to(x.dtype)
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    return (x / scale).round().clamp(-128, 127) * scale
