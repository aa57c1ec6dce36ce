"""Scales that training has moved out of what a checkpoint can hold: said when a model is evaluated or saved.

The forward holds such a scale at the end of the range (`grid.snap_scale`), so nothing fails, and a group of weights is
lost. Looking for them waits for the device, once for all layers, so it is not done in every step.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from .layer import MergingLayer, describe_lost


def warn_of_lost_scales(model: nn.Module, adapter: str | None = None) -> None:
    """Warn of scales that have left their range.

    Args:
        adapter: whose scales; None: those of the adapters at work in each layer.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, MergingLayer) and not layer.merged and not layer.disable_adapters
        if not any(p.is_meta for _, p in layer.named_parameters())  # an adapter that is about to be loaded
    }
    adapters = None if adapter is None else [adapter]
    counts = {name: count for name, layer in layers.items() if (count := layer.scales_lost(adapters)) is not None}
    if not counts:
        return
    device = next(iter(counts.values())).device  # layers may lie on several
    numbers = torch.stack([count.to(device) for count in counts.values()]).tolist()
    lost = {name: number for name, number in zip(counts, numbers, strict=True) if number}
    if lost:
        first = next(iter(lost))
        warnings.warn(
            f"{sum(lost.values())} scales in {len(lost)} layers, e.g. {first!r}, "
            f"{describe_lost(layers[first].frozen.scale_dtype)} Merging refuses them.",
            stacklevel=2,
        )
