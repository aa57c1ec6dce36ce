"""torchao's `IntxUnpackedToInt8Tensor` in safetensors files: codes as int8, one byte a weight.

    _weight_qdata         int8 (out, in), centred codes
    _weight_scale         (out, groups), the model's dtype, weight units per grid step
    _weight_zero_point    int8 (out, groups)

It is what vLLM serves below 4 bits on a CPU. transformers' and torchao's own loaders rebuild the tensors from the
files' metadata, which says the width of the codes; the flattening is torchao's. Reading needs no torchao.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..grid import PER_CHANNEL, GridTensor
from .safetensors import (
    Plan,
    SafetensorsWriter,
    container_problems,
    float_activations,
    float_cache,
    no_linear,
    one_grid,
    round_scale,
    scale_problems,
)
from .scheme import Describe, Scheme, Tensors
from .shards import ShardWriter
from .source import LayerInfo, Source
from .usage import how_to_load
from .writer import Loss, Problem, Settings

NAME = "torchao"
PARTS = frozenset({"_weight_qdata", "_weight_scale", "_weight_zero_point"})
SCALE = "_weight_scale"

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
_KIND = "IntxUnpackedToInt8Tensor"


# -- reading


def schemes(quantization: dict[str, Any], metadata: Mapping[str, str]) -> Describe:
    """See `reading.py`. What a layer is stands in the files' metadata, not in config.json."""
    described = {}
    for name, text in metadata.items():
        if name.endswith(".weight"):
            described[name.removesuffix(".weight")] = json.loads(text)
    kinds = {entry["_type"] for entry in described.values()} - {torch.Tensor.__name__}
    if described and kinds != {_KIND}:
        raise ValueError(f"The checkpoint's tensors are {', '.join(sorted(kinds)) or 'floats'}; {_KIND} can be read.")

    def layer(name: str, *others: str) -> Scheme:
        if name not in described:
            raise ValueError(f"Layer {name!r} is stored quantized, but the files' metadata does not describe it.")
        data = described[name]["_data"]
        if data["activation_quantization"] is not None:
            raise ValueError(f"Layer {name!r} rounds its activations, as torchao does; float activations can be read.")
        bits, block = int(data["target_dtype"]["_data"].removeprefix("int")), data["block_size"]
        group_size = block[1] if isinstance(block, list) else PER_CHANNEL
        return Scheme(NAME, bits, group_size, True)

    return layer


def shape(scheme: Scheme, sizes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
    """See `reading.py`."""
    rows, columns = sizes["_weight_qdata"]
    return rows, columns


def read_scales(
    scheme: Scheme, tensors: Tensors, out_features: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reading.py`."""
    return tensors["_weight_scale"], tensors["_weight_zero_point"]


def read_codes(scheme: Scheme, tensors: Tensors, out_features: int, in_features: int) -> torch.Tensor:
    """See `reading.py`."""
    codes = tensors["_weight_qdata"]
    if codes.dtype != torch.int8:
        raise RuntimeError(f"`_weight_qdata` is {codes.dtype}, not int8")
    return codes


# -- writing


class TorchAOWriter(SafetensorsWriter):
    """Writes the format."""

    name = NAME
    needs = ("torchao",)
    usage = how_to_load("torchao")
    in_vllm = True

    def problems(self, source: Source, settings: Settings) -> list[Problem]:
        packed = self.packed(source)
        found = no_linear(source, "torchao's format") or one_grid(source)
        found += float_activations(source, "torchao's Intx tensor") + float_cache(source, "torchao")
        if source.loading.packed_experts:
            reason = "transformers joins the experts of a file into one tensor, and reads no tensors of torchao there"
            found.append(Problem(None, reason, "use compressed-tensors"))
        found += scale_problems(source, {name: info.dtype for name, info in packed.items()})
        return found + container_problems(packed, settings, WIDTHS, "torchao")

    def plan(self, source: Source, settings: Settings) -> Plan:
        from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup
        from transformers import TorchAoConfig

        info = next(iter(self.packed(source).values()))
        group = info.grid.group_size
        dtype = getattr(torch, f"int{settings.container_bits or info.grid.code_bits}")
        config = IntxWeightOnlyConfig(
            weight_dtype=dtype,
            granularity=PerGroup(group) if group > 0 else PerAxis(0),
            mapping_type=MappingType.SYMMETRIC if info.grid.symmetric else MappingType.ASYMMETRIC,
        )
        described = TorchAoConfig(config, modules_to_not_convert=list(source.float_linears) or None).to_dict()
        return Plan(described, f"Intx in int8, {str(dtype).split('.')[1]}", dtype)

    def stored(self, name: str, weight: GridTensor, info: LayerInfo, settings: Settings, loss: Loss) -> GridTensor:
        return round_scale(name, weight, info.dtype, settings, loss)

    def tensors(self, name: str, weight: GridTensor, info: LayerInfo, plan: Plan) -> dict[str, torch.Tensor]:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
        from torchao.quantization import IntxUnpackedToInt8Tensor

        scale = weight.scale.expand(info.out_features, -1).to(info.dtype).contiguous()
        zero = torch.zeros_like(scale, dtype=torch.int8) if weight.zero_point is None else weight.zero_point
        tensor = IntxUnpackedToInt8Tensor(
            weight.codes,
            scale,
            zero.expand(scale.shape).contiguous(),
            plan.details,
            (1, info.in_features // scale.shape[1]),
            info.dtype,
            None,
        )
        key = f"{name}.weight"
        parts, metadata = flatten_tensor_state_dict({key: tensor})
        plan.metadata[key] = metadata[key]
        return {part.removeprefix(f"{name}."): value for part, value in parts.items()}

    def finish(self, shards: ShardWriter, folder: Path, source: Source, plan: Plan) -> None:
        super().finish(shards, folder, source, plan)
        metadata = dict(plan.metadata)
        for name in shards.names:
            if name.rpartition(".")[2] not in PARTS:
                metadata[name] = json.dumps({"_type": torch.Tensor.__name__})
        for name, inside in source.modules.items():  # transformers looks for its own names, vLLM for those of the file
            metadata[f"{inside}.weight"] = metadata[f"{name}.weight"]
        # the loaders read the metadata of all tensors from any of the files
        shards.metadata |= {**metadata, "tensor_names": json.dumps(list(metadata))}
