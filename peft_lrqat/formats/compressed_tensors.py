"""config.json's side of a compressed-tensors checkpoint (format "pack-quantized")."""

from __future__ import annotations

from typing import Any

from ..grid import Grid

#: How a layer is stored: its grid, the width of its codes, and 8 if its input is rounded to 8 bits per token, or None.
Stored = tuple[Grid, int, int | None]


def quantization_config(float_linears: list[str], layers: dict[str, Stored]) -> dict[str, Any]:
    """config.json's `quantization_config`.

    Args:
        float_linears: names of the nn.Linear modules that are not quantized; they are listed under "ignore".
        layers: module name -> how it is stored, for every quantized module. Those that are alike make a group; a
            single group names all linear layers instead of each.
    """
    alike: dict[Stored, list[str]] = {}
    for name, scheme in layers.items():
        alike.setdefault(scheme, []).append(name)
    targets = [["Linear"]] if len(alike) == 1 else list(alike.values())
    groups = [_group(names, *scheme) for names, scheme in zip(targets, alike, strict=True)]
    return _config(float_linears, {f"group_{i}": group for i, group in enumerate(groups)})


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
    formats = {group["format"] for group in groups.values()}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
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
