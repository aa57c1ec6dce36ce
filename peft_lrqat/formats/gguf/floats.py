"""Tensors that are not on a grid: norms, biases, embeddings, and layers that were left as floats."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .blocks import BLOCK_TYPES
from .contents import Contents

#: What embeddings and the head may be stored as; "auto" is the dtype they have.
FLOAT_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StoredFloats:
    """A tensor's bytes.

    Attributes:
        type: name of ggml's type.
        data: uint8 (rows, bytes of a row).
        error: |w' - w| / |w| over the tensor (2-norms); 0 where nothing was rounded.
    """

    type: str
    data: torch.Tensor
    error: float


def exact_type(dtype: torch.dtype) -> str:
    """The name of the type that holds a dtype."""
    return next(name for name, held in _DTYPES.items() if held == dtype)


def store(weight: torch.Tensor, kind: str) -> StoredFloats:
    """A float tensor of one or two dimensions as one of `FLOAT_TYPES`.

    Raises:
        ValueError: its rows do not divide into Q8_0's blocks.
    """
    weight = weight.detach().cpu().contiguous()
    if kind == "auto":
        kind = exact_type(weight.dtype)
    rows = weight.shape[0] if weight.dim() > 1 else 1
    if kind == "q8_0":
        data, read = _round_to_q8_0(weight.float())
    else:
        stored = weight.to(_DTYPES[kind])
        data, read = stored.view(rows, -1).view(torch.uint8), stored.float()
    exact = weight.float()
    error = 0.0 if torch.equal(read, exact) else ((read - exact).norm() / exact.norm()).item()
    return StoredFloats(kind, data, error)


def _round_to_q8_0(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q8_0 blocks of a float matrix, and the weights they stand for."""
    kind = BLOCK_TYPES["q8_0"]
    if weight.shape[-1] % kind.size:
        raise ValueError(f"{weight.shape[-1]} columns do not divide into Q8_0 blocks of {kind.size}; use 'f16'")
    blocks = weight.reshape(-1, kind.size)
    d = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
    d[d == 0] = 1.0
    levels = (blocks / d).round().clamp(-127, 127).to(torch.int16)
    data = kind.pack(Contents(levels, d, torch.zeros_like(levels[:, :1]))).view(weight.shape[0], -1)
    return data, (levels * d).view_as(weight)
