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
    return _config(float_linears, {"group_0": _group(["Linear"], grid, bits, act_bits)})


def mixed_config(float_linears: list[str], layers: dict[str, tuple[Grid, int]]) -> dict[str, Any]:
    """config.json's `quantization_config` where layers differ in their grids.

    Args:
        float_linears: as for `quantization_config`.
        layers: module name -> grid, container width.
    """
    alike: dict[tuple[Grid, int], list[str]] = {}
    for name, scheme in layers.items():
        alike.setdefault(scheme, []).append(name)
    if len(alike) == 1:
        return quantization_config(float_linears, *next(iter(alike)))
    groups = {f"group_{i}": _group(names, grid, bits, None) for i, ((grid, bits), names) in enumerate(alike.items())}
    return _config(float_linears, groups)


def _group(targets: list[str], grid: Grid, bits: int, act_bits: int | None) -> dict[str, Any]:
    activations = {"num_bits": act_bits, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "format": "pack-quantized" if act_bits is None else "int-quantized",
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": grid.symmetric,
            # a per-tensor scale is stored once per channel, see QuantizedLinear
            "strategy": "group" if grid.group_size > 0 else "channel",
            "group_size": grid.group_size if grid.group_size > 0 else None,
            "dynamic": False,
        },
        "input_activations": None if act_bits is None else activations,
        "output_activations": None,
    }


def _config(float_linears: list[str], groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": next(iter(groups.values()))["format"],
        "quantization_status": "compressed",
        "ignore": list(float_linears),
        "kv_cache_scheme": None,
        "config_groups": groups,
    }
    if not all(group["weights"]["symmetric"] for group in groups.values()):
        # transformers sizes packed zero points wrongly where it keeps the model compressed (its "weight_zero_point"
        # then has one row per output channel, and loading fails; seen with transformers 5.23 and compressed-tensors
        # 0.20), but reads them rightly where it decompresses while loading. It takes the choice from config.json; vLLM
        # ignores the key.
        config["dequantize"] = True
    return config
