"""config.json's side of a checkpoint in transformers' own BitNet format."""

from __future__ import annotations

from typing import Any

from torch import nn

from .linear import MERGED


def quantization_config(model: nn.Module) -> dict[str, Any] | None:
    """`config.quantization_config` for a merged model, or None if it has no quantized layer.

    "autobitlinear" in mode "offline" multiplies the output with `weight_scale`; transformers' other class, "bitlinear",
    divides by it.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not any(isinstance(module, MERGED) for module in linears.values()):
        return None
    return {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": [name for name, module in linears.items() if not isinstance(module, MERGED)],
    }
