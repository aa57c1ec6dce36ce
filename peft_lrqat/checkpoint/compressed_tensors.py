"""config.json's side of a compressed-tensors checkpoint (format "pack-quantized")."""

from __future__ import annotations

from typing import Any

from ..grid import Grid


def quantization_config(float_linears: list[str], grid: Grid, bits: int, act_bits: int | None = None) -> dict[str, Any]:
    """config.json's `quantization_config`.

    Args:
        float_linears: names of the nn.Linear modules that are not quantized; they are listed under "ignore".
        grid: the grid of the codes.
        bits: container width.
        act_bits: 8 if activations are quantized, per token; the format is "int-quantized" then.
    """
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
        "ignore": list(float_linears),
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
