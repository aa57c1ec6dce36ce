"""The fixed scales of activations (`act_scale="static"`), from what the layers receive on calibration text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..tuners.common.layer import MergingLayer
from .modes import in_eval


@torch.no_grad()
def calibrate_activations(model: nn.Module, batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]]) -> None:
    """Set the fixed scales of the active adapter, so that the grid holds the largest inputs of some text.

    Call it after `get_peft_model` and before training, which then learns the scales. While it runs, weights are rounded
    and inputs are not. With several processes, give each the same batches.

    Args:
        model (nn.Module): a model with an adapter of `act_scale="static"`.
        batches (Iterable): token ids, int64 (batch, length), or what the model's forward takes by name.

    Raises:
        ValueError: no active adapter has fixed scales; the model is merged; a layer received no input, only zeros, or
            values that are not finite. No scale was changed then.

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_lrqat import LRQATConfig, calibrate_activations
        >>> model = get_peft_model(base, LRQATConfig(bits=8, act_bits=8, act_scale="static"))
        >>> calibrate_activations(model, [tokenizer(texts[0][:64], return_tensors="pt")])
    """
    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MergingLayer) and sum(a in module.act_scales for a in module.active_adapters) == 1
    }
    if not layers or any(layer.merged for layer in layers.values()):
        raise ValueError(
            "The model has no single active, unmerged adapter with fixed scales of activations. Make one with "
            "`act_scale='static'`, or leave the calibration out."
        )
    try:
        for layer in layers.values():
            layer._observed = torch.zeros((), device=layer.frozen.device)
        with in_eval(model):
            for batch in batches:
                here = {"input_ids": batch} if isinstance(batch, torch.Tensor) else dict(batch)
                device = next(iter(layers.values())).frozen.device
                model(**{name: value.to(device) if hasattr(value, "to") else value for name, value in here.items()})
        largest = {name: layer._observed for name, layer in layers.items()}
    finally:
        for layer in layers.values():
            layer._observed = None
    for name, value in largest.items():
        if not bool(torch.isfinite(value) & (value > 0)):
            raise ValueError(
                f"The largest input of layer {name!r} on the calibration text is {float(value)}. Give text that "
                f"reaches every layer, or leave this one float: `act_bits_pattern={{{name!r}: None}}`."
            )
    for name, layer in layers.items():
        (adapter,) = [a for a in layer.active_adapters if a in layer.act_scales]
        steps = 2.0 ** (layer.adapter_options[adapter].activations_of(layer.name).bits - 1) - 0.5
        layer.act_scales[adapter].weight.copy_((largest[name] / steps).log2().view(1))
