"""What a checkpoint holds: grid, container, size, exactness of its scales, and how its codes are distributed."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..formats.source import Source
from .engines import Engine, engines
from .folder import FolderSource
from .inspect_gguf import inspect_file
from .open import open_source
from .verify_gguf import gguf_file

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        folder, format: of the checkpoint; the format of an adapter's folder is "adapter".
        grid: what was trained, in words; `bits`, `group_size`, `symmetric` in numbers.
        container_bits: width of the stored codes.
        layers, weights: how many are quantized.
        layer_bytes, total_bytes: of the quantized weights with their scales, and of all tensors; None for an adapter.
        scales: how many there are.
        inexact_scales: dtype -> how many of them it cannot hold exactly.
        scale_dtype: what they were trained to be exact in, None if unknown.
        histogram: code -> how many weights have it.
        engines: which load it.
    """

    folder: str
    format: str
    grid: str
    bits: float
    group_size: int
    symmetric: bool
    act_bits: int | None
    container_bits: int
    layers: int
    weights: int
    layer_bytes: int | None
    total_bytes: int | None
    scales: int
    inexact_scales: dict[str, int]
    scale_dtype: str | None
    recipe: str | None
    histogram: dict[int, int]
    engines: list[Engine]

    @property
    def bits_per_weight(self) -> float | None:
        """Of the quantized weights, scales included."""
        return None if self.layer_bytes is None else 8 * self.layer_bytes / self.weights

    @property
    def entropy(self) -> float:
        """Bits a code, as information: what a perfect packing of the codes would take."""
        shares = [count / self.weights for count in self.histogram.values() if count]
        return -sum(share * math.log2(share) for share in shares)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "bits_per_weight": self.bits_per_weight, "entropy": self.entropy}


def inspect(folder: str | os.PathLike) -> Inspection:
    """Look at a merged or exported checkpoint, or at an adapter (whose base model is loaded).

    Raises:
        ValueError, FileNotFoundError: as for `open_source`.
    """
    file = gguf_file(Path(folder))
    if file is not None:
        return inspect_file(file)
    source = open_source(Path(folder))
    infos = source.grids()
    first = next(iter(infos.values()))
    counts: dict[int, int] = dict.fromkeys(range(first.grid.qmin, first.grid.qmax + 1), 0)
    scales, inexact = 0, {"float16": 0, "bfloat16": 0}
    for name in infos:
        weight = source.layer(name)
        low = int(weight.codes.min())
        for offset, count in enumerate(torch.bincount(weight.codes.flatten().int() - low).tolist()):
            counts[low + offset] = counts.get(low + offset, 0) + count
        scales += weight.scale.numel()
        for dtype in (torch.float16, torch.bfloat16):
            inexact[str(dtype).split(".")[1]] += int((weight.scale.to(dtype).float() != weight.scale).sum())
    layer_bytes, total_bytes = _sizes(source)
    return Inspection(
        folder=str(folder),
        format=source.format if isinstance(source, FolderSource) else "adapter",
        grid=", ".join(dict.fromkeys(info.grid.describe() for info in infos.values())),
        bits=first.grid.bits,
        group_size=first.grid.group_size,
        symmetric=first.grid.symmetric,
        act_bits=source.act_bits,
        container_bits=first.container_bits,
        layers=len(infos),
        weights=sum(info.weights for info in infos.values()),
        layer_bytes=layer_bytes,
        total_bytes=total_bytes,
        scales=scales,
        inexact_scales=inexact,
        scale_dtype=source.scale_dtype,
        recipe=source.recipe,
        histogram=dict(sorted(counts.items())),
        engines=_engines(source),
    )


def _sizes(source: Source) -> tuple[int | None, int | None]:
    if not isinstance(source, FolderSource):
        return None, None
    infos, layers, total = source.grids(), 0, 0
    for name, entry in source.files.items():
        size = math.prod(entry.shape) * _BYTES.get(entry.dtype, 1)
        module, _, part = name.rpartition(".")
        layers += size if module in infos and part in source.parts else 0
        total += size
    return layers, total


def _engines(source: Source) -> list[Engine]:
    if not isinstance(source, FolderSource):
        return [Engine("PEFT + peft-lrqat", True, "merge or export it for other engines")]
    infos = list(source.grids().values())
    group = source.file_group
    return engines(source.format, infos, infos[0].container_bits, group, source.act_bits)
