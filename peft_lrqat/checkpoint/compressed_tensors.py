"""config.json's side of a compressed-tensors checkpoint (format "pack-quantized")."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..grid import Grid
from .linear import MERGED


def quantization_config(model: nn.Module, grid: Grid, bits: int, act_bits: int | None = None) -> dict[str, Any] | None:
    """`config.quantization_config` for a merged model, or None if it has no packed layer.

    Args:
        grid: the grid of the codes.
        bits: container width.
        act_bits: 8 if activations are quantized, per token; the format is "int-quantized" then.

    Every nn.Linear that stayed float is listed by name under "ignore".
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not any(isinstance(module, MERGED) for module in linears.values()):
        return None
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": grid.symmetric,
        # a per-tensor scale is stored once per channel, see QuantizedLinear
        "strategy": "group" if grid.group_size > 0 else "channel",
        "group_size": grid.group_size if grid.group_size > 0 else None,
        "dynamic": False,
    }
    form = "pack-quantized" if act_bits is None else "int-quantized"
    activations = {"num_bits": act_bits, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": [name for name, module in linears.items() if not isinstance(module, MERGED)],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": form,
                "weights": weights,
                "input_activations": None if act_bits is None else activations,
                "output_activations": None,
            }
        },
    }
    if not grid.symmetric:
        # transformers sizes packed zero points wrongly where it keeps the model compressed (its "weight_zero_point"
        # then has one row per output channel, and loading fails; seen with transformers 5.23 and compressed-tensors
        # 0.20), but reads them rightly where it decompresses while loading. It takes the choice from config.json; vLLM
        # ignores the key.
        config["dequantize"] = True
    return config
