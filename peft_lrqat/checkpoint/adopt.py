"""A quantized model that transformers loaded, made into what `load_quantized` gives.

transformers keeps such a model packed until its first forward, which replaces the integers by floats. Both states are
read: the packed one directly; in the other, scales and zero points are still there, and the codes follow from the
floats (they are checked: the floats must be exactly those that codes and scales stand for). BitNet's layers hold
their codes as floats from the start.

`adopt_own` is for float adapters of PEFT (LoRA ...). On a packed model as transformers loads it PEFT fails, because its
layers have no `weight`; on the others it merges into a weight that the layer then quantizes again, or that the next
`save_pretrained` stores beside the old scales.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, cast

import torch
from torch import nn

from ..formats import bitnet, reading
from ..formats.compressed_tensors import cache_rounding, matches, scheme_of
from ..formats.record import Record
from ..formats.scheme import Scheme
from ..grid import PER_TENSOR, TERNARY, Grid, GridTensor
from ..modules.experts import is_stacked
from ..modules.kv_cache import adopt_cache
from ..modules.packed import describe, merged_layer
from ..ops.kv_cache import CacheRounding
from .load import replace_layer


def adopt_compressed_tensors(model: nn.Module) -> bool:
    """Replace every linear layer that compressed-tensors manages by a `QuantizedLinear`, in place.

    Returns:
        Whether there were any.

    Raises:
        ValueError: something is quantized that a `QuantizedLinear` cannot hold. Nothing was changed then.
    """
    managed = _managed(model)
    if not managed:
        return False
    _refuse_float_experts(model)
    record = Record.of(cast(Any, model).config)
    layers = {
        name: _packed(name, module, _scheme(name, module), None if record is None else record.grid_of(name))
        for name, module in managed.items()
    }
    cache = _cache(model)
    adopt_cache(model, record.cache if cache is None and record is not None else cache)
    _replace(model, layers)
    return True


def adopt_own(model: nn.Module) -> None:
    """Make a model one of this package before PEFT puts a float adapter on it.

    That is done for checkpoints that this package wrote, and for those that PEFT cannot adapt. All others, and models
    that cannot be read, stay as they are.
    """
    config = getattr(model, "config", None)
    managed, bitnet_layers = _managed(model), _bitnet_layers(model)
    if config is None or not (managed or bitnet_layers):
        return
    unreadable = any("weight" not in module._parameters for module in managed.values())
    with contextlib.suppress(ValueError):
        if (record := Record.of(config)) is not None or unreadable:
            adopt_compressed_tensors(model)
        if record is not None and bitnet_layers:
            _replace(model, {name: _ternary(name, layer) for name, layer in bitnet_layers.items()})


def _managed(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of what compressed-tensors manages."""
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None and hasattr(module, "weight_scale")
    }


def _refuse_float_experts(model: Any) -> None:
    """Raise ValueError if transformers has made floats of experts that the file holds as integers."""
    described = getattr(model.config, "quantization_config", None)
    ignored = (described if isinstance(described, dict) else described.to_dict()).get("ignore") if described else ()
    for name, module in model.named_modules():
        files = [f"{name}.0.{part}" for part in ("gate_proj", "up_proj", "w1", "w3")]
        if is_stacked(module) and not any(matches(entry, file) for entry in ignored or () for file in files):
            raise ValueError(
                f"transformers has made floats of the experts {name!r}, which the checkpoint holds as integers. Load "
                "it with `peft_lrqat.load_quantized(...)`, which keeps them."
            )


def _bitnet_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of BitNet's layers as this package writes them."""
    # not imported here: that takes seconds (torch's inductor), and whoever has such a layer has imported it
    kind = getattr(sys.modules.get("transformers.integrations.bitnet"), "AutoBitLinear", ())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kind) and not module.online_quant and module.rms_norm is None
    }


def _replace(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    changed: Any = model  # its attributes are transformers', which declares few of them
    for name, layer in layers.items():
        replace_layer(model, name, layer)
    hook = model.__dict__.pop("ct_decompress_hook", None)
    if hook is not None:
        hook.remove()
    for mark in ("hf_quantizer", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    if conversions := getattr(model, "_weight_conversions", None):  # `save_pretrained` reverts them
        changed._weight_conversions = [one for one in conversions if not _of_quantizer(one)]
    changed.is_quantized = False
    changed.config._is_quantized = False
    describe(model)


def _of_quantizer(conversion: Any) -> bool:
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))


def _cache(model: nn.Module) -> CacheRounding | None:
    """How compressed-tensors rounds a model's KV cache, or None."""
    for module in model.modules():
        if hasattr(module, "kv_cache") and (scheme := getattr(module, "quantization_scheme", None)) is not None:
            return cache_rounding({"kv_cache_scheme": scheme.input_activations.model_dump(mode="json")})
    return None


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


@torch.no_grad()
def _ternary(name: str, module: Any) -> nn.Module:
    codes = module.weight.detach().to(torch.int8)
    if not torch.equal(codes.to(module.weight.dtype), module.weight) or codes.abs().max() > 1:
        raise ValueError(f"The weight of module {name!r} does not lie on its grid any more.")
    weight = GridTensor(codes, module.weight_scale.float().view(1, 1), None, Grid(TERNARY, PER_TENSOR))
    return merged_layer(weight, module.bias, 2, module.weight_scale.dtype, activations=bitnet.ACTIVATIONS)
