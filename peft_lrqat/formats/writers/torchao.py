"""torchao's `IntxUnpackedToInt8Tensor` in safetensors files: codes as int8, one byte a weight.

It is what vLLM serves below 4 bits on a CPU. transformers' and torchao's own loaders rebuild the tensors from the
files' metadata; the flattening is torchao's.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from ...checkpoint.card import how_to_load
from ...grid import GridTensor
from ..source import LayerInfo, Source
from ..writer import Problem, Settings
from .base import SafetensorsWriter, container_problems, float_activations, no_linear, one_grid

_WIDTHS = (2, 3, 4, 5, 6, 7, 8)


class TorchAOWriter(SafetensorsWriter):
    """See the module's docstring."""

    name = "torchao"
    needs = {"torchao": "torchao"}  # noqa: RUF012  # a ClassVar, annotated in the base
    usage = how_to_load("torchao")

    def __init__(self) -> None:
        self._metadata: dict[str, str] = {}  # tensor of the model -> what it is
        self._parts: set[str] = set()  # tensors of the files that belong to one

    def problems(self, source: Source, settings: Settings) -> list[Problem]:
        found = no_linear(source, "torchao's format") or one_grid(source)
        found += float_activations(source, "torchao's Intx tensor")
        return found + container_problems(self.packed(source), settings, _WIDTHS, "torchao")

    def quantization_config(self, source: Source, settings: Settings) -> dict[str, Any]:
        from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup
        from transformers import TorchAoConfig

        info = next(iter(self.packed(source).values()))
        group = info.grid.group_size
        config = IntxWeightOnlyConfig(
            weight_dtype=self._dtype(info, settings),
            granularity=PerGroup(group) if group > 0 else PerAxis(0),
            mapping_type=MappingType.SYMMETRIC if info.grid.symmetric else MappingType.ASYMMETRIC,
        )
        return TorchAoConfig(config, modules_to_not_convert=list(source.float_linears) or None).to_dict()

    def _dtype(self, info: LayerInfo, settings: Settings) -> torch.dtype:
        return getattr(torch, f"int{settings.container_bits or info.grid.code_bits}")

    def tensors(self, name: str, weight: GridTensor, info: LayerInfo, settings: Settings) -> dict[str, torch.Tensor]:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
        from torchao.quantization import IntxUnpackedToInt8Tensor

        scale = weight.scale.expand(info.out_features, -1).to(info.dtype).contiguous()
        zero = torch.zeros_like(scale, dtype=torch.int8) if weight.zero_point is None else weight.zero_point
        tensor = IntxUnpackedToInt8Tensor(
            weight.codes,
            scale,
            zero.expand(scale.shape).contiguous(),
            self._dtype(info, settings),
            (1, info.in_features // scale.shape[1]),
            info.dtype,
            None,
        )
        key = f"{name}.weight"
        parts, metadata = flatten_tensor_state_dict({key: tensor})
        self._metadata[key] = metadata[key]
        self._parts.update(parts)
        return {part.removeprefix(f"{name}."): value for part, value in parts.items()}

    def write(self, source, folder, settings, progress):
        written = super().write(source, folder, settings, progress)
        info = next(iter(self.packed(source).values()))
        written.container = f"Intx in int8, {str(self._dtype(info, settings)).split('.')[1]}"
        return written

    def finish(self, shards, folder, source, settings):
        super().finish(shards, folder, source, settings)
        for name in shards.names:
            if name not in self._parts:
                self._metadata[name] = json.dumps({"_type": torch.Tensor.__name__})
        # the loaders read the metadata of all tensors from any of the files
        shards.metadata |= {**self._metadata, "tensor_names": json.dumps(list(self._metadata))}
