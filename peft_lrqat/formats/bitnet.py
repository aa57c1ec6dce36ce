"""transformers' own BitNet format: packing of the codes, and config.json's side."""

from __future__ import annotations

from typing import Any

import torch

_PER_BYTE = 4


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Four codes a byte, code + 1 in two bits, from four blocks of rows.

    Args:
        codes: int8 (out, in) in {-1, 0, 1}; `out` a multiple of 4.

    Returns:
        uint8 (out / 4, in).
    """
    blocks = (codes + 1).to(torch.uint8).view(_PER_BYTE, -1, codes.shape[1])
    stored = blocks[0].clone()
    for i in range(1, _PER_BYTE):
        stored |= blocks[i] << (2 * i)
    return stored


def unpack(stored: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack`: int8 (out, in)."""
    return torch.cat([(stored >> (2 * i)) & 3 for i in range(_PER_BYTE)]).to(torch.int8) - 1


def quantization_config(float_linears: list[str], linear_class: str = "autobitlinear") -> dict[str, Any]:
    """config.json's `quantization_config`.

    Args:
        float_linears: names of the nn.Linear modules that are not quantized.

    "autobitlinear" in mode "offline" multiplies the output with `weight_scale`; transformers' other class, "bitlinear",
    divides by it.
    """
    return {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": list(float_linears),
    }
