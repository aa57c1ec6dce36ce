"""compressed-tensors: "pack-quantized" (2 to 8 bits, float activations) and "int-quantized" (W8A8).

The tensors are those of the merged modules (`QuantizedLinear`, `Int8Linear`), so that this writer and `save_pretrained`
of a merged model give the same file.
"""

from __future__ import annotations

from typing import Any

import torch

from ...checkpoint.card import how_to_load
from ...grid import GridTensor
from ...modules.packed import QuantizedLinear
from ...modules.rounded_input import Int8Linear
from ...ops.activations import describe_rule
from .. import compressed_tensors
from ..source import LayerInfo, Source
from ..writer import Problem, Settings
from .base import SafetensorsWriter, container, container_problems, no_linear, one_grid

_WIDTHS = (2, 3, 4, 5, 6, 7, 8)


class CompressedTensorsWriter(SafetensorsWriter):
    """See the module's docstring."""

    name = "compressed-tensors"
    usage = how_to_load('"compressed-tensors>=0.18"')

    def problems(self, source: Source, settings: Settings) -> list[Problem]:
        found = no_linear(source, "compressed-tensors") or one_grid(source)
        if source.act_bits is None:
            return found + container_problems(self.packed(source), settings, _WIDTHS, "compressed-tensors")
        found += container_problems(self.packed(source), settings, (8,), "the int-quantized format (W8A8)")
        if source.activations != self.name:
            reason = (
                f"activations were trained with {describe_rule(source.activations)} (BitNet), and transformers rounds "
                f"those of this format with {describe_rule(self.name)}"
            )
            found.append(Problem(None, reason, "use format='bitnet', or allow_inexact=True", inexact=True))
        for name, info in self.packed(source).items():
            if info.grid.group_size > 0 or not info.grid.symmetric:
                reason = f"8-bit activations with the grid {info.grid.describe()}: int8 products take one scale a row"
                found.append(Problem(name, reason, "train with group_size=-1 or 0, symmetric"))
        return found

    def quantization_config(self, source: Source, settings: Settings) -> dict[str, Any]:
        info = next(iter(self.packed(source).values()))
        bits = self._bits(info, settings, source.act_bits)
        layers = dict.fromkeys(self.packed(source), (info.grid, bits, source.act_bits))
        return compressed_tensors.quantization_config(source.float_linears, layers)

    def _bits(self, info: LayerInfo, settings: Settings, act_bits: int | None) -> int:
        return 8 if act_bits is not None else container(info, settings, _WIDTHS)

    def write(self, source, folder, settings, progress):
        self._act_bits = source.act_bits
        written = super().write(source, folder, settings, progress)
        described = self.quantization_config(source, settings)
        bits = described["config_groups"]["group_0"]["weights"]["num_bits"]
        written.container = f"{described['format']}, {bits} bits"
        return written

    def tensors(self, name: str, weight: GridTensor, info: LayerInfo, settings: Settings) -> dict[str, torch.Tensor]:
        if self._act_bits is not None:
            return Int8Linear(weight, None, info.dtype).state_dict()
        return QuantizedLinear(weight, None, self._bits(info, settings, None), info.dtype).state_dict()
