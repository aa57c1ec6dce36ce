"""The only reader: config.json says how a module is stored (`Scheme`), and with it its tensors become a `GridTensor`.

Everything that reads a checkpoint comes through here: `export`, `inspect`, `verify`, `load_quantized`, and the adoption
of a model that transformers loaded. Each format's own file has

    PARTS                                    last parts of the names of a layer's tensors
    schemes(quantization, metadata)          module name -> `Scheme`; refuses by name what it cannot read
    shape(scheme, sizes, read)               (out, in) of a layer
    read_scales(scheme, tensors, out, in)    scales and centred zero points, (rows, groups)
    read_codes(scheme, tensors, out, in)     centred codes, int8 (out, in)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from ..grid import Grid, GridTensor
from ..ops.kv_cache import CacheRounding
from . import awq, bitnet, compressed_tensors, gptq, torchao
from .record import Record
from .scheme import (
    Describe,
    Scales,
    Scheme,
    Tensors,
    check_codes,
    check_input_scale,
    check_order,
    check_scales,
    narrow,
)
from .shards import Entry

#: `quant_method` of config.json -> the file that reads it.
READERS: dict[str, ModuleType] = {
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "bitnet": bitnet,
    "torchao": torchao,
}

#: The formats that can be read.
METHODS = tuple(READERS)

# Tensors that a layer has beside its weight.
_BESIDE = {"bias"}
_INTEGERS = {"I8", "U8", "I16", "I32", "I64"}


def describe(quantization: dict[str, Any], metadata: Mapping[str, str] | None = None) -> Describe:
    """Make a function that says how a layer is stored. It takes the layer's name in the file and, if the model has
    another name for it, that one too, because config.json may use either.

    Args:
        quantization: `quantization_config` of config.json.
        metadata: of the safetensors files' headers, which one format needs.

    Raises:
        ValueError: a method that cannot be read, or a part of it that has no exact counterpart here.
    """
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise ValueError(
            f"The checkpoint is quantized with {method!r}; {', '.join(METHODS)} can be read. For others, start from "
            "the float model."
        )
    try:
        scheme_of = READERS[method].schemes(quantization, metadata or {})
    except _MALFORMED as error:
        raise _malformed(method, error) from error

    def layer(*names: str) -> Scheme:
        try:
            scheme = scheme_of(*names)
        except _MALFORMED as error:
            raise _malformed(method, error) from error
        if isinstance(scheme.bits, bool) or not isinstance(scheme.bits, int) or not 2 <= scheme.bits <= 8:
            raise ValueError(f"Layer {names[0]!r} is stored with {scheme.bits!r} bits; 2 to 8 can be read.")
        return scheme

    return layer


def cache_rounding(quantization: dict[str, Any], record: Record | None) -> CacheRounding | None:
    """How a checkpoint's model rounds its KV cache, or None.

    Args:
        quantization: `quantization_config` of config.json.
        record: config.json's own entry, which says it where the format does not.

    Raises:
        ValueError: in a way that this package does not train.
    """
    found = compressed_tensors.cache_rounding(quantization)
    return record.cache if found is None and record is not None else found


# What looking into an entry of another shape than expected raises.
_MALFORMED = (TypeError, KeyError, AttributeError, IndexError, re.error)


def _malformed(method: str, error: Exception) -> ValueError:
    return ValueError(
        f"config.json's `quantization_config` ({method}) is not as this format has it ({error!r}). "
        "Download the checkpoint again, or repair the entry."
    )


def quantized_modules(method: str, entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """Module name -> last part of the name -> entry, for the modules whose weight is stored as integers.

    A module counts as soon as it has one of the format's tensors. So a module that lacks some of them is found, and
    refused when it is read; it is not taken for a float layer.
    """
    parts = READERS[method].PARTS - {"weight"}
    modules: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = entry
    return {
        name: tensors
        for name, tensors in modules.items()
        if tensors.keys() & parts or ("weight" in tensors and tensors["weight"].dtype in _INTEGERS)
    }


def check_parts(scheme: Scheme, found: Iterable[str], where: str) -> None:
    """Raise ValueError if a layer has tensors that its format does not know: what they do would be lost."""
    unknown = sorted(set(found) - READERS[scheme.method].PARTS - _BESIDE)
    if unknown:
        raise ValueError(
            f"Layer {where!r} ({scheme.method}) holds {', '.join(map(repr, unknown))}, which cannot be read here: the "
            "model would not be the one that was stored. Start from a checkpoint without, or from the float model."
        )


def read_scales(
    scheme: Scheme, tensors: Tensors, out_features: int, in_features: int, where: str, recorded: Grid | None = None
) -> Scales:
    """The small tensors of a layer, checked; its codes are not touched.

    Args:
        tensors: what the file holds for the layer, without the layer's name.
        where: the layer's name, for messages.
        recorded: the grid that config.json records for the layer (`Record.grid_of`), or None.

    Raises:
        ValueError: something is missing, does not fit, or cannot be held by a `Grid`.
    """
    check_parts(scheme, tensors, where)
    try:
        scale, zero_point = READERS[scheme.method].read_scales(scheme, tensors, out_features, in_features)
    except (KeyError, RuntimeError) as error:
        raise _unreadable(scheme, tensors, out_features, in_features, where, error) from error
    scales = check_scales(scheme, scale, zero_point, out_features, in_features, where)
    for name in ("g_idx", "weight_g_idx"):
        if name in tensors:
            check_order(tensors[name], in_features, in_features // scales.scale.shape[1], where, name)
    check_input_scale(scheme, tensors, where)
    return scales if recorded is None else narrow(scales, recorded, out_features, in_features, where)


def read(
    scheme: Scheme, tensors: Tensors, out_features: int, in_features: int, where: str, recorded: Grid | None = None
) -> GridTensor:
    """A layer's codes, scales and zero points; arguments and errors as for `read_scales`."""
    scales = read_scales(scheme, tensors, out_features, in_features, where, recorded)
    try:
        codes = READERS[scheme.method].read_codes(scheme, tensors, out_features, in_features)
    except (KeyError, RuntimeError) as error:
        raise _unreadable(scheme, tensors, out_features, in_features, where, error) from error
    if tuple(codes.shape) != (out_features, in_features):
        raise ValueError(
            f"Layer {where!r} has {out_features} x {in_features} weights, but its codes are {tuple(codes.shape)}."
        )
    return replace(check_codes(scales, codes, where), input_scale=check_input_scale(scheme, tensors, where))


def _unreadable(
    scheme: Scheme, tensors: Tensors, out_features: int, in_features: int, where: str, error: Exception
) -> ValueError:
    shapes = {name: tuple(tensors[name].shape) for name in tensors}
    reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return ValueError(
        f"Layer {where!r} ({out_features} x {in_features}, {scheme.method}, {scheme.bits} bits) cannot be read from "
        f"{shapes}: {reason}"
    )


def scale_dtype(tensors: Tensors, method: str) -> torch.dtype:
    """The dtype of a layer's scales in the file."""
    return tensors[READERS[method].SCALE].dtype
