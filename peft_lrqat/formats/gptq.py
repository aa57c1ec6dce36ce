"""GPTQ, for gptqmodel, transformers with optimum, vLLM, and onnxruntime-genai's model builder.

    qweight   int32 (in * bits / 32, out)        codes u = q + 2^(bits-1), packed along the inputs, first in lowest bits
    qzeros    int32 (groups, out * bits / 32)    u of the zero point, packed along the outputs; minus 1 in version 1
    scales    fp16  (groups, out)
    g_idx     int32 (in,)                        group of an input: i // group_size

    W = scales * (u - zero)

Both packings are dense little-endian bit streams (32 codes of 3 bits in three words), as `packing.py` has them. Version
1 ("gptq", which every engine reads) stores zero - 1 and so has no zero point u = 0; version 2 ("gptq_v2") has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..grid import PER_CHANNEL, GridTensor
from ..packing import pack, unpack
from .safetensors import (
    Plan,
    SafetensorsWriter,
    container,
    container_problems,
    float_activations,
    float_cache,
    no_linear,
    one_grid,
    round_scale,
    scale_problems,
)
from .scheme import Describe, Scheme, Tensors, int32, pattern_matches
from .shards import ShardWriter
from .source import LayerInfo, Source
from .usage import how_to_load
from .writer import Loss, Problem, Settings

NAME = "gptq"
PARTS = frozenset({"qweight", "qzeros", "scales", "g_idx"})
SCALE = "scales"

BITS = (2, 3, 4, 8)
VERSIONS = ("gptq", "gptq_v2")

# How much less than itself a version stores a zero point.
_STORED_LESS = {"gptq": 1, "gptq_v2": 0}


# -- a layer's tensors


def pack_layer(weight: GridTensor, bits: int, group_size: int, version: str) -> dict[str, torch.Tensor]:
    """The four tensors of a layer, all exact.

    Args:
        weight: (out, in); both multiples of 32; scales that fp16 holds.
        bits: width of the stored codes, one of `BITS`, at least the grid's.
        group_size: of the file; divides the grid's group (or the whole row: -1), whose scales are repeated.
        version: one of `VERSIONS`.

    Raises:
        ValueError: version 1, and a zero point lies at the lower end of the stored codes.
    """
    out_features, in_features = weight.codes.shape
    groups = in_features // group_size if group_size > 0 else 1

    def spread(per_scale: torch.Tensor) -> torch.Tensor:  # (rows, groups of the grid) to (groups of the file, out)
        per_row = per_scale.expand(out_features, -1)
        return per_row.repeat_interleave(groups // per_row.shape[1], dim=1).t().contiguous()

    zero = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero_point is None else weight.zero_point
    if version == "gptq":
        if int(zero.min()) == -(1 << (bits - 1)):
            raise ValueError(
                "A zero point lies at the lower end of the codes, which version 1 of GPTQ cannot hold. Pass "
                "checkpoint_format='gptq_v2', or container_bits wider than the grid."
            )
        zero = zero - _STORED_LESS[version]
    return {
        "qweight": pack(weight.codes, bits).t().contiguous(),
        "qzeros": pack(spread(zero), bits),
        "scales": spread(weight.scale).to(torch.float16),
        "g_idx": (torch.arange(in_features, dtype=torch.int32) // (group_size if group_size > 0 else in_features)),
    }


def quantization_config(
    bits: int, group_size: int, symmetric: bool, version: str, packed: list[str], float_linears: list[str]
) -> dict[str, Any]:
    """config.json's `quantization_config`, which is quantize_config.json as well.

    Args:
        packed: names of the packed modules.
        float_linears: names of the other nn.Linear modules. Engines expect a float head. Any other is named in both
            ways that engines read: what is packed (transformers, vLLM) and what is not (gptqmodel, vLLM).
    """
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": symmetric,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "lm_head": False,
        "meta": {"quantizer": ["peft-lrqat"]},
    }
    left_out = [name for name in float_linears if in_block(name)]
    if left_out:
        config["modules_in_block_to_quantize"] = [sorted(packed)]
        config["dynamic"] = {"-:^" + name.replace(".", r"\.") + "$": {} for name in left_out}
    return config


def in_block(name: str) -> bool:
    """Whether a module belongs to one of a model's numbered blocks: "model.layers.0.mlp.up_proj"."""
    return any(part.isdigit() for part in name.split("."))


# -- reading


def schemes(quantization: dict[str, Any], metadata: Mapping[str, str]) -> Describe:
    """See `reading.py`. `dynamic` has patterns of module names ("+:" or none: options of those modules; "-:": modules
    that are not quantized)."""
    version = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if version not in VERSIONS:
        raise ValueError(
            f'The checkpoint\'s GPTQ format is {version!r}, made for one kernel. "gptq" and "gptq_v2" can be read: '
            "look for the checkpoint in that format."
        )
    overrides = quantization.get("dynamic") or {}

    def layer(name: str, *others: str) -> Scheme:
        own: dict[str, Any] = next(
            (
                options
                for pattern, options in overrides.items()
                if not pattern.startswith("-:")
                and any(pattern_matches(pattern.removeprefix("+:"), called) for called in (name, *others))
            ),
            {},
        )
        said = {**quantization, **own}
        bits, group_size = said.get("bits"), said.get("group_size", -1)
        if bits not in BITS:
            raise ValueError(f"Layer {name!r} is stored with {bits!r} bits in GPTQ; {BITS} can be read.")
        group_size = group_size if group_size > 0 else PER_CHANNEL
        return Scheme(NAME, bits, group_size, bool(said.get("sym", True)), version)

    return layer


def shape(scheme: Scheme, sizes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
    """See `reading.py`."""
    words, out_features = sizes["qweight"]
    return out_features, words * 32 // scheme.bits


def read_scales(
    scheme: Scheme, tensors: Tensors, out_features: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reading.py`."""
    bits = scheme.bits
    zero_point = unpack(int32(tensors["qzeros"], "qzeros"), bits, out_features)
    if less := _STORED_LESS[scheme.variant]:
        if (zero_point == (1 << (bits - 1)) - 1).any():
            raise RuntimeError(
                f"a zero point is stored as {2**bits - 1}, which format v1 reads as {2**bits} or 0, depending on the "
                'program; store the checkpoint as "gptq_v2"'
            )
        zero_point = zero_point + less
        if scheme.symmetric and bool((zero_point == 1).all()):
            raise RuntimeError(
                "all zero points are one above the middle, although config.json says `sym`: the file is of version "
                '"gptq_v2" and does not say so; set `checkpoint_format` in its quantization_config'
            )
    return tensors["scales"].t().contiguous(), zero_point.t().contiguous()


def read_codes(scheme: Scheme, tensors: Tensors, out_features: int, in_features: int) -> torch.Tensor:
    """See `reading.py`."""
    return unpack(int32(tensors["qweight"], "qweight").t().contiguous(), scheme.bits, in_features)


# -- writing


#: Group sizes in which one scale per channel is repeated: engines' 4-bit kernels take these, best first.
_REPEATED = (128, 64, 32)
_SMALLEST_GROUP = 16


class GPTQWriter(SafetensorsWriter):
    """Writes the format."""

    name = NAME
    usage = how_to_load("gptqmodel", "from gptqmodel import GPTQModel\nmodel = GPTQModel.load")
    in_vllm = True

    @dataclass(frozen=True)
    class Options:
        """Options of format "gptq"."""

        checkpoint_format: str = field(
            default="gptq", metadata={"help": "gptq (version 1), or gptq_v2, for zero points at the lowest code."}
        )

        def __post_init__(self) -> None:
            if self.checkpoint_format not in VERSIONS:
                allowed = ", ".join(map(repr, VERSIONS))
                raise ValueError(f"`checkpoint_format` is {self.checkpoint_format!r}; allowed are {allowed}.")

    def problems(self, source: Source, settings: Settings) -> list[Problem]:
        packed = self.packed(source)
        found = no_linear(source, "GPTQ") or one_grid(source)
        found += float_activations(source, "GPTQ") + float_cache(source, "GPTQ")
        found += container_problems(packed, settings, BITS, "GPTQ")
        for name, info in packed.items():
            shape = f"{info.out_features} x {info.in_features}"
            if info.out_features % 32 or info.in_features % 32:
                reason = f"its shape (out x in: {shape}) does not divide by 32, into which GPTQ packs both"
                found.append(Problem(name, reason, "leave it out with exclude_modules, or use compressed-tensors"))
            if info.grid.group_size > 0 and (info.grid.group_size % _SMALLEST_GROUP or info.grid.group_size > 1024):
                reason = f"groups of {info.grid.group_size}; GPTQ's kernels take multiples of {_SMALLEST_GROUP}"
                found.append(Problem(name, reason, "train with group_size=128, 64 or 32, or -1"))
            if not in_block(name):
                reason = "it lies outside of the model's blocks, where transformers expects float layers"
                found.append(Problem(name, reason, "leave it out with exclude_modules, or use compressed-tensors"))
        if settings.options.checkpoint_format == "gptq":
            for name, info in packed.items():
                zero, lowest = source.zero_point(name), -(1 << (container(info, settings, BITS) - 1))
                if zero is not None and int(zero.min()) <= lowest:
                    reason = "a zero point lies at the lower end of the codes, which version 1 of GPTQ cannot hold"
                    hint = "checkpoint_format='gptq_v2', or container_bits wider than the grid"
                    found.append(Problem(name, reason, hint))
        if packed and not found and self._group_size(packed) == -1 and self._bits(packed, settings) == 4:
            name, info = min(packed.items(), key=lambda item: item[1].in_features & -item[1].in_features)
            reason = (
                f"one scale per channel, and {info.in_features} inputs do not divide into groups of 128, 64 or 32, in "
                "which it could be repeated; transformers' and gptqmodel's 4-bit kernels take no other"
            )
            found.append(Problem(name, reason, "use compressed-tensors, or container_bits=8"))
        return found + scale_problems(source, dict.fromkeys(packed, torch.float16))

    def _group_size(self, packed: dict[str, LayerInfo]) -> int:
        """Of the file: the grid's, or what a channel's scale is repeated in, or -1 if nothing divides."""
        own = next(iter(packed.values())).grid.group_size
        if own > 0:
            return own
        sizes = [size for size in _REPEATED if all(info.in_features % size == 0 for info in packed.values())]
        return sizes[0] if sizes else -1

    def _bits(self, packed: dict[str, LayerInfo], settings: Settings) -> int:
        return container(next(iter(packed.values())), settings, BITS)

    def plan(self, source: Source, settings: Settings) -> Plan:
        packed = self.packed(source)
        described = quantization_config(
            self._bits(packed, settings),
            self._group_size(packed),
            next(iter(packed.values())).grid.symmetric,
            settings.options.checkpoint_format,
            list(packed),
            source.float_linears,
        )
        group = described["group_size"]
        share = f"groups of {group}" if group > 0 else "per channel"
        return Plan(described, f"{described['checkpoint_format']}, {described['bits']} bits, {share}")

    def stored(self, name: str, weight: GridTensor, info: LayerInfo, settings: Settings, loss: Loss) -> GridTensor:
        return round_scale(name, weight, torch.float16, settings, loss)

    def tensors(self, name: str, weight: GridTensor, info: LayerInfo, plan: Plan) -> dict[str, torch.Tensor]:
        described = plan.quantization_config
        return pack_layer(weight, described["bits"], described["group_size"], described["checkpoint_format"])

    def finish(self, shards: ShardWriter, folder: Path, source: Source, plan: Plan) -> None:
        super().finish(shards, folder, source, plan)
        text = json.dumps(plan.quantization_config, indent=2) + "\n"
        (folder / "quantize_config.json").write_text(text, encoding="utf-8")
