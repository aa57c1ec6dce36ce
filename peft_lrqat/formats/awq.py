"""AWQ ("gemm", 4 bits): read, not written.

qweight   int32 (in, out / 8)        codes u = q + 8, packed along the outputs, whose order is `ORDER` qzeros    int32
(groups, out / 8)    u of the zero point, packed in the same way scales    fp16  (groups, out)

W = scales * (u - zero)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..grid import PER_CHANNEL
from ..packing import unpack
from .scheme import Describe, Scheme, Tensors, int32

NAME = "awq"
PARTS = frozenset({"qweight", "qzeros", "scales"})
SCALE = "scales"

#: Where each nibble of a word belongs.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def schemes(quantization: dict[str, Any], metadata: Mapping[str, str]) -> Describe:
    """See `reading.py`."""
    bits, version = quantization.get("bits", 4), str(quantization.get("version") or "gemm").lower()
    if bits != 4 or version != "gemm":
        raise ValueError(
            f'The checkpoint\'s AWQ format is version {version!r} with {bits} bits; "gemm" with 4 bits can be read.'
        )
    group_size = quantization.get("group_size", 128)
    group_size = group_size if group_size > 0 else PER_CHANNEL
    stored = Scheme(NAME, 4, group_size, not quantization.get("zero_point", True))
    return lambda *names: stored


def shape(scheme: Scheme, sizes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
    """See `reading.py`."""
    in_features, words = sizes["qweight"]
    return words * 8, in_features


def read_scales(
    scheme: Scheme, tensors: Tensors, out_features: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reading.py`."""
    return tensors["scales"].t().contiguous(), _unpack(int32(tensors["qzeros"], "qzeros")).t().contiguous()


def read_codes(scheme: Scheme, tensors: Tensors, out_features: int, in_features: int) -> torch.Tensor:
    """See `reading.py`."""
    return _unpack(int32(tensors["qweight"], "qweight")).t().contiguous()


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """Centred int8 (rows, 8 * words)."""
    plain = unpack(packed, 4, packed.shape[1] * 8).view(packed.shape[0], -1, 8)
    codes = torch.empty_like(plain)
    codes[..., list(ORDER)] = plain
    return codes.view(packed.shape[0], -1)
