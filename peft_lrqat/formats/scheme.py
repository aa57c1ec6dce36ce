"""Codes, scales and zero points out of the tensors that other tools store for one linear layer; no float weight.

    compressed-tensors, packed     weight_packed (out, words) int32, along inputs; weight_zero_point (words, groups)
    compressed-tensors, integers   weight (out, in) int8; weight_zero_point (out, groups) int8
    GPTQ                           qweight (in * bits / 32, out) int32, along inputs; qzeros (groups, out * bits / 32)
    AWQ (GEMM)                     qweight (in, out / 8) int32, along outputs, columns 0 2 4 6 1 3 5 7; qzeros likewise

all with scales that multiply `code - zero point`: (out, groups) in compressed-tensors, (groups, out) in the others.
GPTQ and AWQ count codes and zero points from 0; ours are centred (`grid.py`), which is 2^(bits-1) less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..grid import PER_CHANNEL, PER_TENSOR, Grid, GridTensor, dequantize, quantize
from ..packing import unpack, words_per_row

Tensors = Mapping[str, torch.Tensor]

#: Where each nibble of a word of AWQ belongs.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class StoredLayer:
    """How a checkpoint stores one linear layer.

    Attributes:
        method: "compressed-tensors", "gptq" or "awq".
        bits: width of the stored codes.
        group_size: as in `Grid`.
        symmetric: what the checkpoint says; zero points that it stores all the same must then be the middle.
        gptq_v1: GPTQ's first format, which stores zero points less one.
    """

    method: Literal["compressed-tensors", "gptq", "awq"]
    bits: int
    group_size: int
    symmetric: bool
    gptq_v1: bool = False

    def read(self, tensors: Tensors, out_features: int, in_features: int, where: str) -> GridTensor:
        """The layer's codes, scales and zero points.

        Args:
            tensors: what the file holds for the layer, without the layer's name.
            where: the layer's name, for messages.

        Raises:
            ValueError: the tensors do not fit each other, or hold something that a `Grid` cannot.
        """
        reader = {"compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq}[self.method]
        try:
            codes, scale, zero_point = reader(self, tensors, out_features, in_features)
        except (KeyError, RuntimeError) as error:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ValueError(
                f"Layer {where!r} ({out_features} x {in_features}, {self.method}, {self.bits} bits) cannot be read "
                f"from {shapes}: {error}"
            ) from error
        if tuple(codes.shape) != (out_features, in_features):
            raise ValueError(
                f"Layer {where!r} has {out_features} x {in_features} weights, but its codes are {codes.shape}."
            )
        symmetric = self.symmetric and (zero_point is None or not zero_point.any())
        if zero_point is None and not symmetric:
            zero_point = torch.zeros(scale.shape, dtype=torch.int8, device=scale.device)
        grid = Grid(
            self.bits,
            self.group_size if scale.shape[1] > 1 or self.group_size == PER_TENSOR else PER_CHANNEL,
            symmetric,
        )
        if tuple(scale.shape) != grid.scale_shape(out_features, in_features):
            raise ValueError(
                f"Layer {where!r} has scales of shape {tuple(scale.shape)}; {grid.describe()} needs "
                f"{grid.scale_shape(out_features, in_features)}."
            )
        _check_groups(tensors, in_features // scale.shape[1], where)
        return _positive(codes, scale, None if symmetric else zero_point, grid, where)


def _compressed_tensors(stored: StoredLayer, tensors: Tensors, out_features: int, in_features: int) -> tuple:
    bits, scale = stored.bits, tensors["weight_scale"].float()
    scale = scale.reshape(1, 1) if stored.group_size == PER_TENSOR else scale.reshape(out_features, -1)
    zero_point = tensors.get("weight_zero_point")
    if zero_point is not None:
        if zero_point.dtype == torch.int32 and "weight_packed" in tensors:
            zero_point = _unpack_rows(zero_point.t().contiguous(), bits, out_features).t()
        zero_point = zero_point.reshape(scale.shape).to(torch.int8).contiguous()
    if "weight_packed" in tensors:
        return _unpack_rows(tensors["weight_packed"], bits, in_features), scale, zero_point
    codes = tensors["weight"]
    if codes.is_floating_point():  # in memory, after a first forward
        codes = quantize(tensors["weight"], scale, zero_point, Grid(bits, PER_CHANNEL, zero_point is None))
        if not torch.equal(dequantize(codes, scale, zero_point, tensors["weight"].dtype), tensors["weight"]):
            raise RuntimeError("the weight was changed after it was loaded, and does not lie on its grid any more")
    elif codes.dtype != torch.int8:
        raise RuntimeError(f"`weight` is {codes.dtype}, not int8")
    return codes, scale, zero_point


def _unpack_rows(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Centred codes of packed rows; before compressed-tensors 0.18, no code of odd width straddled two words."""
    per_word = 32 // bits
    if packed.shape[1] == words_per_row(columns, bits):
        return unpack(packed, bits, columns)
    if packed.shape[1] != -(-columns // per_word):
        raise RuntimeError(f"{packed.shape[1]} words a row do not hold {columns} codes of {bits} bits")
    shifts = torch.arange(per_word, device=packed.device, dtype=torch.int32) * bits
    unsigned = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return (unsigned.flatten(1)[:, :columns] - (1 << (bits - 1))).to(torch.int8)


def _gptq(stored: StoredLayer, tensors: Tensors, out_features: int, in_features: int) -> tuple:
    bits = stored.bits
    codes = unpack(tensors["qweight"].t().contiguous(), bits, in_features)
    zero_point = unpack(tensors["qzeros"], bits, out_features)
    if stored.gptq_v1:
        top = (1 << (bits - 1)) - 1
        if (zero_point == top).any():
            raise RuntimeError(
                f"a zero point is stored as {2**bits - 1}, which format v1 reads as {2**bits} or 0, depending on the "
                'program; store the checkpoint as "gptq_v2"'
            )
        zero_point = zero_point + 1
    return codes, tensors["scales"].float().t().contiguous(), zero_point.t().contiguous()


def _awq(stored: StoredLayer, tensors: Tensors, out_features: int, in_features: int) -> tuple:
    codes, zero_point = (_unpack_awq(tensors[name]) for name in ("qweight", "qzeros"))
    return codes.t().contiguous(), tensors["scales"].float().t().contiguous(), zero_point.t().contiguous()


def _unpack_awq(packed: torch.Tensor) -> torch.Tensor:
    """Centred int8 (rows, 8 * words)."""
    plain = unpack(packed, 4, packed.shape[1] * 8).view(packed.shape[0], -1, 8)
    codes = torch.empty_like(plain)
    codes[..., list(AWQ_ORDER)] = plain
    return codes.view(packed.shape[0], -1)


def _check_groups(tensors: Tensors, per_scale: int, where: str) -> None:
    """Raise ValueError if inputs belong to scales in any but their own order."""
    for name in ("g_idx", "weight_g_idx"):
        index = tensors.get(name)
        if index is None or (index < 0).all():  # compressed-tensors writes -1 where there is no order
            continue
        plain = torch.arange(index.numel(), device=index.device) // per_scale
        if not torch.equal(index.to(plain.dtype), plain):
            raise ValueError(
                f'Layer {where!r} assigns inputs to scales by activation order (`{name}`; "desc_act": true in GPTQ, '
                '"actorder": "group" in compressed-tensors). A grid with groups needs neighbouring inputs to share a '
                "scale: quantize again with static groups or without activation order."
            )


def _positive(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, grid: Grid, where: str
) -> GridTensor:
    if not torch.isfinite(scale).all() or (scale < 0).any():
        raise ValueError(
            f"Layer {where!r} has scales that are negative, infinite or NaN. A trained grid has positive scales; "
            "quantize the model again with a tool that writes them."
        )
    if (scale == 0).any():  # such weights are 0: so they are with the middle code and any scale
        per_weight = scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1).expand(codes.shape)
        middle: Any = 0 if zero_point is None else zero_point.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
        codes = torch.where(per_weight == 0, middle, codes)
        scale = torch.where(scale == 0, 2.0**-24, scale)
    return GridTensor(codes, scale, zero_point, grid)
