"""GPTQ, for gptqmodel, transformers with optimum, vLLM, and onnxruntime-genai's model builder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch

from ...checkpoint.card import how_to_load
from ...grid import GridTensor
from .. import gptq
from ..source import LayerInfo, Source
from ..writer import Loss, Problem, Settings
from .base import (
    SafetensorsWriter,
    container,
    container_problems,
    float_activations,
    no_linear,
    one_grid,
    round_scale,
    scale_problems,
)

#: Group sizes in which one scale per channel is repeated: engines' 4-bit kernels take these, best first.
_REPEATED = (128, 64, 32)
_SMALLEST_GROUP = 16


class GPTQWriter(SafetensorsWriter):
    """See the module's docstring."""

    name = "gptq"
    usage = how_to_load("gptqmodel", "from gptqmodel import GPTQModel\nmodel = GPTQModel.load")

    @dataclass(frozen=True)
    class Options:
        """Options of format "gptq"."""

        checkpoint_format: str = field(
            default="gptq", metadata={"help": "gptq (version 1), or gptq_v2, for zero points at the lowest code."}
        )

        def __post_init__(self) -> None:
            if self.checkpoint_format not in gptq.VERSIONS:
                allowed = ", ".join(map(repr, gptq.VERSIONS))
                raise ValueError(f"`checkpoint_format` is {self.checkpoint_format!r}; allowed are {allowed}.")

    def problems(self, source: Source, settings: Settings) -> list[Problem]:
        packed = self.packed(source)
        found = no_linear(source, "GPTQ") or one_grid(source)
        found += float_activations(source, "GPTQ") + container_problems(packed, settings, gptq.BITS, "GPTQ")
        for name, info in packed.items():
            shape = f"{info.out_features} x {info.in_features}"
            if info.out_features % 32 or info.in_features % 32:
                reason = f"its shape (out x in: {shape}) does not divide by 32, into which GPTQ packs both"
                found.append(Problem(name, reason, "leave it out with exclude_modules, or use compressed-tensors"))
            if info.grid.group_size > 0 and (info.grid.group_size % _SMALLEST_GROUP or info.grid.group_size > 1024):
                reason = f"groups of {info.grid.group_size}; GPTQ's kernels take multiples of {_SMALLEST_GROUP}"
                found.append(Problem(name, reason, "train with group_size=128, 64 or 32, or -1"))
            if not gptq.in_block(name):
                reason = "it lies outside of the model's blocks, where transformers expects float layers"
                found.append(Problem(name, reason, "leave it out with exclude_modules, or use compressed-tensors"))
        if packed and not found and self._group_size(packed) == -1 and self._bits(packed, settings) == 4:
            name, info = min(packed.items(), key=lambda item: item[1].in_features & -item[1].in_features)
            reason = (
                f"one scale per channel, and {info.in_features} inputs do not divide into groups of 128, 64 or 32, in "
                "which it could be repeated; transformers' and gptqmodel's 4-bit kernels take no other"
            )
            found.append(Problem(name, reason, "use compressed-tensors, or container_bits=8"))
        return found + scale_problems(source, packed, torch.float16)

    def _group_size(self, packed: dict[str, LayerInfo]) -> int:
        """Of the file: the grid's, or what a channel's scale is repeated in, or -1 if nothing divides."""
        own = next(iter(packed.values())).grid.group_size
        if own > 0:
            return own
        sizes = [size for size in _REPEATED if all(info.in_features % size == 0 for info in packed.values())]
        return sizes[0] if sizes else -1

    def _bits(self, packed: dict[str, LayerInfo], settings: Settings) -> int:
        return container(next(iter(packed.values())), settings, gptq.BITS)

    def quantization_config(self, source: Source, settings: Settings) -> dict[str, Any]:
        packed = self.packed(source)
        return gptq.quantization_config(
            self._bits(packed, settings),
            self._group_size(packed),
            next(iter(packed.values())).grid.symmetric,
            settings.options.checkpoint_format,
            list(packed),
            source.float_linears,
        )

    def stored(self, name: str, weight: GridTensor, info: LayerInfo, settings: Settings, loss: Loss) -> GridTensor:
        return round_scale(name, weight, torch.float16, settings, loss)

    def tensors(self, name: str, weight: GridTensor, info: LayerInfo, settings: Settings) -> dict[str, torch.Tensor]:
        return gptq.pack_layer(weight, self._file["bits"], self._file["group_size"], self._file["checkpoint_format"])

    def write(self, source, folder, settings, progress):
        self._file = self.quantization_config(source, settings)
        (folder / "quantize_config.json").write_text(json.dumps(self._file, indent=2) + "\n", encoding="utf-8")
        written = super().write(source, folder, settings, progress)
        group = self._file["group_size"]
        share = f"groups of {group}" if group > 0 else "per channel"
        written.container = f"{self._file['checkpoint_format']}, {self._file['bits']} bits, {share}"
        return written
