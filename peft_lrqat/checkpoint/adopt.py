"""A compressed-tensors model that transformers loaded, made into what `load_quantized` gives.

transformers keeps such a model packed until its first forward, which replaces the integers by floats. Both states are
read: the packed one directly; in the other, scales and zero points are still there, and the codes follow from the
floats (they are checked: the floats must be exactly those that codes and scales stand for).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..formats import reading
from ..formats.compressed_tensors import scheme_of
from ..formats.record import Record
from ..formats.scheme import Scheme
from ..grid import Grid
from ..modules.packed import describe, merged_layer
from .load import replace_layer


def adopt_compressed_tensors(model: nn.Module) -> bool:
    """Replace every linear layer that compressed-tensors manages by a `QuantizedLinear`, in place.

    Returns:
        Whether there were any.

    Raises:
        ValueError: something is quantized that a `QuantizedLinear` cannot hold. Nothing was changed then.
    """
    managed = {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None and hasattr(module, "weight_scale")
    }
    if not managed:
        return False
    changed: Any = model  # its attributes are transformers', which declares few of them
    record = Record.of(changed.config)
    layers = {
        name: _packed(name, module, _scheme(name, module), None if record is None else record.grid_of(name))
        for name, module in managed.items()
    }
    for name, layer in layers.items():
        replace_layer(model, name, layer)
    hook = model.__dict__.pop("ct_decompress_hook", None)
    if hook is not None:
        hook.remove()
    for mark in ("hf_quantizer", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    changed.is_quantized = False
    changed.config._is_quantized = False
    describe(model)
    return True


def _scheme(name: str, module: nn.Module) -> Scheme:
    if not isinstance(module, nn.Linear):
        raise ValueError(f"Module {name!r} ({type(module).__name__}) is quantized; only linear layers can be read.")
    scheme: Any = module.quantization_scheme
    return scheme_of(f"The scheme of {name!r}", scheme.model_dump(mode="json"), "pack-quantized")


@torch.no_grad()
def _packed(name: str, module: Any, stored: Scheme, recorded: Grid | None) -> nn.Module:
    tensors = {n: t.detach() for n, t in (*module.named_parameters(), *module.named_buffers()) if n != "bias"}
    weight = reading.read(stored, tensors, module.out_features, module.in_features, name, recorded)
    scale_dtype = tensors["weight_scale"].dtype
    return merged_layer(weight, module.bias, stored.bits, scale_dtype, activations=stored.activations)
