"""Checks that run before a model is changed. Each error names what is wrong, where, and what to do."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...chunks import row_chunks
from ...formats.reading import METHODS
from ...modules.packed import MERGED, QuantizedLinear
from .config import QUANTIZED_BASE
from .fingerprint import codes_checksum, float_checksum

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# What a checkpoint in the model's dtype can hold exactly.
_STORABLE = {
    torch.float32: ("auto", "bf16", "fp16", "fp32"),
    torch.bfloat16: ("auto", "bf16"),
    torch.float16: ("auto", "fp16"),
}


def check_base(model: nn.Module, config: Any) -> None:
    """Raise ValueError if the model is quantized already, in a way that training cannot start from."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    method = getattr(method, "value", method)  # transformers' enum
    packed = any(isinstance(module, MERGED) for module in model.modules())
    adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    if packed and config.takes_quantized:
        return
    if (isinstance(method, str) and not adapted) or packed:
        how = (
            f"Load it with `peft_lrqat.load_quantized(...)`, which keeps its integers for {config.method} to start from"
            if config.takes_quantized and method in METHODS
            else "Load the float model"
        )
        raise ValueError(
            f"The base model is already quantized ({method or 'packed layers'}), but {config.method} starts from float "
            f"weights{' or from integers' if config.takes_quantized else ''}. {how}; for a model that was "
            "dequantized on loading (GGUF), delete `model.config.quantization_config`."
        )


def check_targets(model: nn.Module, targets: dict[str, nn.Module], config: Any) -> None:
    """Raise ValueError if a targeted module cannot be converted."""
    owners: dict[int, list[str]] = {}  # weight -> the slots that hold it; a slot of a shared parent counts once
    for parent_name, parent in model.named_modules():
        for child_name, child in parent._modules.items():
            weight = None if child is None else child._parameters.get("weight")
            if weight is not None:
                owners.setdefault(id(weight), []).append(f"{parent_name}.{child_name}".lstrip("."))

    for name, module in targets.items():
        if isinstance(module, BaseTunerLayer):
            continue
        where = f"module {name!r} ({type(module).__name__})"
        if not isinstance(module, config.quantizes):
            *others, last = ("nn." * (kind is not Conv1D) + kind.__name__ for kind in config.quantizes)
            raise ValueError(
                f"`target_modules` names {where}, but {config.method} quantizes {', '.join(others)} and {last} only. "
                "Use 'all-linear', or leave the module out with `exclude_modules`."
            )
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
            raise ValueError(
                f"`target_modules` names {where}, whose `max_norm` or `sparse` needs a float table. Leave it out, or "
                "train it in float with `modules_to_save` or `trainable_token_indices`."
            )
        if isinstance(module, QuantizedLinear) and config.takes_quantized:
            _check_quantized(module, config, where)
            continue
        weight = module._parameters.get("weight")
        if weight is None or not weight.is_floating_point() or weight.dtype not in _FLOATS:
            kind = (
                "no float weight (it seems to be quantized)" if weight is None else f"a weight of dtype {weight.dtype}"
            )
            raise ValueError(
                f"{where} has {kind}; {config.method} needs float32, bfloat16 or float16 weights. Load the float model."
            )
        if hasattr(weight, "full_tensor"):
            raise ValueError(
                f"The weight of {where} is sharded (a DTensor). Adapt the whole model first, then shard it with "
                "`fully_shard`; tensor-parallel models are not supported."
            )
        if type(weight.data) is not torch.Tensor:
            raise ValueError(
                f"The weight of {where} is a {type(weight.data).__name__}, no plain tensor: it seems to be quantized "
                "already. Load the float model."
            )
        if weight.device.type == "meta":
            raise ValueError(
                f"The weight of {where} is on the meta device, so there is nothing to quantize. Load the model with "
                "its weights (without `init_empty_weights`, and without offloading this module to disk)."
            )
        if config.scale_dtype not in _STORABLE[weight.dtype]:
            raise ValueError(
                f"`scale_dtype` is {config.scale_dtype!r}, but {where} is {weight.dtype}, and so will the checkpoint's "
                f"scales be. Allowed for it: {_STORABLE[weight.dtype]}; 'auto' is exact everywhere."
            )
        shared = [other for other in owners[id(weight)] if other != name]
        if shared:
            raise ValueError(
                f"The weight of {where} is tied to {shared[0]!r}, which would stay float. Leave {name!r} out of "
                "`target_modules`, or untie it first: set `model.config.tie_word_embeddings = False` and give it a "
                "clone of the weight as its own nn.Parameter."
            )
        in_features = weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]
        config.grid.check_divides(in_features, where)
        for rows in row_chunks(weight.shape[0], weight.shape[1], weight.device):
            if not torch.isfinite(weight[rows]).all():
                raise ValueError(
                    f"The weight of {where} holds NaN or infinite values. Load an intact checkpoint, or repair the "
                    "weight before adapting the model."
                )


def _check_quantized(layer: QuantizedLinear, config: Any, where: str) -> None:
    if layer.weight_packed.is_meta:
        raise ValueError(f"The integers of {where} are on the meta device. Load the model with its weights.")
    if config.scale_dtype not in _STORABLE[layer.compute_dtype]:
        warnings.warn(
            f"`scale_dtype` is {config.scale_dtype!r}, that of the quantized base, but the model is "
            f"{layer.compute_dtype}, in which a checkpoint cannot store such scales. Training uses them exactly; "
            "before merging, call `model.float()`.",
            stacklevel=2,
        )


def check_fingerprint(targets: dict[str, Any], config: Any) -> str:
    """The fingerprint of the targeted modules' weights, floats or integers; ValueError if `config` comes with another.

    That of integers starts with `QUANTIZED_BASE`.
    """
    total, integers = 0, False
    for index, module in enumerate(targets.values()):
        if isinstance(module, BaseTunerLayer):
            checksum: int = module.frozen.source_checksum  # type: ignore[attr-defined]  # a layer of ours
            integers |= module.frozen.from_codes  # type: ignore[attr-defined]
        elif isinstance(module, QuantizedLinear):
            checksum, integers = codes_checksum(module.grid_tensor()), True
        else:
            checksum = float_checksum(module.weight.t() if isinstance(module, Conv1D) else module.weight)
        total += checksum * (2 * index + 1)  # by order, not by name: PEFT and transformers prefix names differently
    fingerprint = f"{QUANTIZED_BASE * integers}{total % 2**64:016x}"
    required = config._required_fingerprint
    if required is not None and required != fingerprint:
        kinds = ["float weights", "integers"]
        wanted, here = (kinds[str(print_).startswith(QUANTIZED_BASE)] for print_ in (required, fingerprint))
        how = (
            "Load it on the quantized model that it was trained on, with `peft_lrqat.load_quantized(...)`"
            if wanted == "integers"
            else "Load it on the float model, in the dtype, that it was trained on"
        )
        raise ValueError(
            f"This adapter was trained on another base model: its {wanted} had the fingerprint {required}, but the "
            f"targeted modules of this model have {here} with {fingerprint}. On other weights it means something else, "
            f"so it was not loaded. {how} (see `base_model_name_or_path` in its adapter_config.json); for a new "
            "adapter, make a new LRQATConfig, or set `base_fingerprint=None`."
        )
    return fingerprint


def check_adapter_file(targets: dict[str, Any], config: Any) -> None:
    """Raise ValueError if the adapter file that `config` was loaded with does not fit the model's modules."""
    shapes = config._adapter_shapes
    if shapes is None:
        return
    for name, module in targets.items():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module  # LoraLayer has these; its base class does not declare them
            in_features, out_features = layer.in_features, layer.out_features
        elif isinstance(module, QuantizedLinear):
            in_features, out_features = module.in_features, module.out_features
        else:
            out_features, in_features = module.weight.shape
            if isinstance(module, Conv1D):
                out_features, in_features = in_features, out_features
        for part, shape in config.expected_shapes(out_features, in_features).items():
            key = f"base_model.model.{name}.{part}"
            saved = shapes.get(key)
            if saved is None:
                continue  # PEFT warns about missing tensors, and its `key_mapping` may rename them
            if len(saved) != len(shape) or any(e is not None and e != s for e, s in zip(shape, saved, strict=True)):
                raise ValueError(
                    f"In the adapter file {key!r} has shape {saved}, but this model needs {shape}. The adapter was "
                    "made for another architecture or group size: load it on the model it was trained on."
                )
