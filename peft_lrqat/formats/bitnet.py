"""transformers' own BitNet format: ternary weights with one scale per tensor, 8-bit activations per token.

    weight          uint8 (out / 4, in), four codes a byte: code + 1 in two bits, from four blocks of rows
    weight_scale    (1,), the model's dtype, weight units per grid step

The layer (`AutoBitLinear`, mode "offline") multiplies its *output* with the scale, and rounds its input by a rule of
its own (`ops.activations`). transformers' other class, `BitLinear`, divides by `weight_scale`, which is then a rounded
inverse. No trained scale survives that exactly, so that class is neither written nor read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..grid import PER_TENSOR, TERNARY, GridTensor
from ..ops.activations import Activations, describe_activations
from .safetensors import Plan, SafetensorsWriter, float_cache, no_linear, one_grid, round_scale, scale_problems
from .scheme import Describe, Scheme, Tensors
from .source import LayerInfo, Source
from .writer import Loss, Problem, Settings

NAME = "bitnet"
PARTS = frozenset({"weight", "weight_scale"})
SCALE = "weight_scale"

#: How its layers round their inputs.
ACTIVATIONS = Activations(NAME)

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


# -- a layer's tensors


def layer_tensors(weight: GridTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a file holds for a layer: ternary, `out` a multiple of 4, one scale, which `dtype` holds."""
    return {"weight": pack(weight.codes), "weight_scale": weight.scale.view(1).to(dtype)}


def quantization_config(float_linears: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`.

    Args:
        float_linears: names of the nn.Linear modules that are not quantized.
    """
    return {
        "quant_method": NAME,
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": list(float_linears),
    }


# -- reading


def schemes(quantization: dict[str, Any], metadata: Mapping[str, str]) -> Describe:
    """See `reading.py`."""
    if (quantization.get("linear_class"), quantization.get("quantization_mode")) != ("autobitlinear", "offline"):
        raise ValueError(
            "The checkpoint is BitNet's with "
            f"linear_class={quantization.get('linear_class')!r}, quantization_mode="
            f"{quantization.get('quantization_mode')!r}. Of BitNet's layers, `linear_class='autobitlinear'` with "
            "`quantization_mode='offline'` holds the scale itself and can be read; 'bitlinear' holds a rounded inverse."
        )
    if quantization.get("use_rms_norm"):
        raise ValueError(
            "The checkpoint's BitNet layers normalise their inputs (`use_rms_norm`), which has no counterpart here. "
            "Start from the float model."
        )
    stored = Scheme(NAME, 2, PER_TENSOR, True, activations=ACTIVATIONS, code_grid=TERNARY)
    return lambda *names: stored


def shape(scheme: Scheme, sizes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
    """See `reading.py`."""
    rows, in_features = sizes["weight"]
    return _PER_BYTE * rows, in_features


def read_scales(
    scheme: Scheme, tensors: Tensors, out_features: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `reading.py`."""
    return tensors["weight_scale"].reshape(-1, 1), None


def read_codes(scheme: Scheme, tensors: Tensors, out_features: int, in_features: int) -> torch.Tensor:
    """See `reading.py`."""
    stored = tensors["weight"]
    if stored.dtype != torch.uint8:
        raise RuntimeError(f"`weight` is {stored.dtype}, not uint8")
    return unpack(stored)


# -- writing


class BitNetWriter(SafetensorsWriter):
    """Writes the format."""

    name = NAME
    usage = """```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/or/repo")
```"""

    def problems(self, source: Source, settings: Settings) -> list[Problem]:
        packed, found = self.packed(source), no_linear(source, "BitNet's format") or one_grid(source)
        if settings.container_bits not in (None, 2):
            found.append(Problem(None, f"container_bits={settings.container_bits}, but BitNet stores 2 bits a code",
                                 "leave container_bits out"))  # fmt: skip
        for trained in sorted(source.activations() - {ACTIVATIONS}, key=str):
            reason = (
                f"activations were trained as {describe_activations(trained)}, and BitNet's layers round them to "
                f"{ACTIVATIONS.describe()}"
            )
            hint = "train with LowBitSRConfig(bits=1.58, group_size=0, act_bits=8), or allow_inexact=True"
            found.append(Problem(None, reason, hint, inexact=True))
        found += float_cache(source, "BitNet's format")
        found += scale_problems(source, {name: info.dtype for name, info in packed.items()})
        for name, info in packed.items():
            grid = info.grid
            if not grid.ternary or grid.group_size != PER_TENSOR:
                reason = f"its grid is {grid.describe()}; BitNet's format holds ternary weights with one scale a tensor"
                found.append(Problem(name, reason, "train with bits=1.58, group_size=0; or use compressed-tensors"))
            elif problem := layer_problem(info.out_features, info.bias):
                found.append(Problem(name, problem, "use compressed-tensors, or leave the layer out of training"))
        return found

    def plan(self, source: Source, settings: Settings) -> Plan:
        return Plan(quantization_config(source.float_linears), "bitnet (autobitlinear), 2 bits")

    def stored(self, name: str, weight: GridTensor, info: LayerInfo, settings: Settings, loss: Loss) -> GridTensor:
        return round_scale(name, weight, info.dtype, settings, loss)

    def tensors(self, name: str, weight: GridTensor, info: LayerInfo, plan: Plan) -> dict[str, torch.Tensor]:
        return layer_tensors(weight, info.dtype)


def layer_problem(out_features: int, bias: bool) -> str | None:
    """Why the format cannot hold a ternary layer, or None."""
    if bias:
        return "it has a bias, which transformers' layer would multiply with the weight's scale"
    if out_features % _PER_BYTE:
        return f"{out_features} output features do not divide by {_PER_BYTE}, the codes of a byte"
    return None
