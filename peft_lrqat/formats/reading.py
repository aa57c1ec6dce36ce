"""What a checkpoint's `quantization_config` says about each of its linear layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..grid import PER_CHANNEL, PER_TENSOR
from .scheme import StoredLayer

#: Module name -> how its weight is stored.
Describe = Callable[[str], StoredLayer]

METHODS = ("compressed-tensors", "gptq", "awq")


def describe(quantization: dict[str, Any]) -> Describe:
    """A function that says how a named layer is stored.

    Args:
        quantization: `quantization_config` of config.json.

    Raises:
        ValueError: a method that cannot be read, or one that quantizes more than the weights of linear layers.
    """
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors(quantization)
    if method == "gptq":
        return _gptq(quantization)
    if method == "awq":
        return _awq(quantization)
    raise ValueError(
        f"The checkpoint is quantized with {method!r}; {', '.join(METHODS)} can be read. For others, start from the "
        "float model."
    )


def _compressed_tensors(quantization: dict[str, Any]) -> Describe:
    for part, what in (
        ("kv_cache_scheme", "a quantized key-value cache"),
        ("transform_config", "transforms (rotations) of the activations"),
        ("sparsity_config", "sparse weights"),
    ):
        value = quantization.get(part)
        if value and not (part == "sparsity_config" and value.get("format") == "dense"):
            raise ValueError(
                f"The checkpoint has {what} (`{part}` in config.json), which this package does not train: the model "
                "would not be the one that was loaded. Start from a checkpoint without, or from the float model."
            )
    groups = [
        (group.get("targets") or [], scheme_of(label, group, quantization.get("format")))
        for label, group in quantization.get("config_groups", {}).items()
    ]

    def layer(name: str) -> StoredLayer:
        for exact in (True, False):  # compressed-tensors: names and patterns come before classes of modules
            for targets, scheme in groups:
                if any(_matches(target, name) if exact else target == "Linear" for target in targets):
                    return scheme
        raise ValueError(
            f"Layer {name!r} is stored quantized, but no entry of `config_groups` in config.json names it."
        )

    return layer


def _matches(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def scheme_of(label: str, group: dict[str, Any], fallback: str | None) -> StoredLayer:
    """How an entry of `config_groups` stores its layers.

    Args:
        label: what the entry is, for messages.
        fallback: the format where the entry names none.

    Raises:
        ValueError: it is not weight-only integers, or not per group, channel or tensor.
    """
    weights, form = group.get("weights") or {}, group.get("format") or fallback
    strategies: dict[Any, Any] = {"group": weights.get("group_size"), "channel": PER_CHANNEL, "tensor": PER_TENSOR}
    known = form in ("pack-quantized", "int-quantized", "naive-quantized")
    if not known or weights.get("type", "int") != "int" or weights.get("strategy") not in strategies:
        raise ValueError(
            f"{label} of the checkpoint has format {form!r} with weights {weights}. Integer weights of 2 to 8 bits per "
            'group, channel or tensor can be read ("pack-quantized", "int-quantized").'
        )
    if group.get("input_activations") or group.get("output_activations"):
        raise ValueError(
            f"{label} of the checkpoint quantizes activations as well as weights (W8A8 and the like). LR-QAT trains "
            "weights and would drop the other half. Start from a weight-only checkpoint or from the float model; "
            "`act_bits=8`, of either configuration, trains with 8-bit activations."
        )
    return StoredLayer(
        "compressed-tensors", weights["num_bits"], strategies[weights["strategy"]], weights.get("symmetric", True)
    )


def _gptq(quantization: dict[str, Any]) -> Describe:
    version = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(
            f'The checkpoint\'s GPTQ format is {version!r}, made for one kernel. "gptq" and "gptq_v2" can be read: '
            "look for the checkpoint in that format."
        )
    overrides = quantization.get("dynamic") or {}

    def layer(name: str) -> StoredLayer:
        own: dict[str, Any] = next((o for p, o in overrides.items() if re.match(p.removeprefix("+:"), name)), {})
        said = {**quantization, **own}
        return StoredLayer("gptq", said["bits"], said["group_size"], said.get("sym", True), version == "gptq")

    return layer


def _awq(quantization: dict[str, Any]) -> Describe:
    bits, version = quantization.get("bits", 4), str(quantization.get("version") or "gemm").lower()
    if bits != 4 or version != "gemm":
        raise ValueError(
            f'The checkpoint\'s AWQ format is version {version!r} with {bits} bits; "gemm" with 4 bits can be read.'
        )
    stored = StoredLayer("awq", 4, quantization.get("group_size", 128), not quantization.get("zero_point", True))
    return lambda name: stored
