"""Checks that run before a model is changed. Each error names what is wrong, where, and what to do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...formats.reading import METHODS
from ...formats.record import Record
from ...modules.architecture import unwritable
from ...modules.packed import MERGED, QuantizedLinear
from .fingerprint import codes_checksum, float_checksum
from .frozen import FrozenWeight
from .layer import MergingLayer
from .plain import check_not_offloaded, check_plain
from .targets import inside_experts

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# What a checkpoint in the model's dtype can hold exactly.
_STORABLE = {
    torch.float32: ("auto", "bf16", "fp16", "fp32"),
    torch.bfloat16: ("auto", "bf16"),
    torch.float16: ("auto", "fp16"),
}


# Parts of the names of tensors in files, whatever the model.
_PARTS = {"base_layer", "base_model", "weight", "bias", "modules_to_save", "original_module", "token_adapter"}


def check_adapter_name(name: Any, model: nn.Module) -> None:
    """Raise ValueError if PEFT could not tell an adapter of this name from something else.

    PEFT finds an adapter's tensors by ".name." in the names of all tensors, saves into a folder of the adapter's name,
    and keeps its layers as attributes.
    """
    if not isinstance(name, str) or not name.strip() or name != name.strip():
        raise ValueError(f"The adapter name is {name!r}; it must be a string without spaces around it.")
    if wrong := [character for character in "./\\:" if character in name] + [c for c in name if not c.isprintable()]:
        raise ValueError(
            f"The adapter name {name!r} contains {wrong[0]!r}, but it becomes part of the names of tensors and of a "
            "folder. Use letters, digits, '_' and '-'."
        )
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name) or name.startswith("__"):
        raise ValueError(
            f"The adapter name {name!r} is the name of an attribute or of a method that torch's modules have. Choose "
            "another."
        )
    taken = {part for path in _own_paths(model) for part in path.split(".")} | _PARTS
    if name in taken:
        raise ValueError(
            f"The adapter name {name!r} is part of the names of the model's own tensors, from which PEFT could not "
            "tell the adapter's. Choose another."
        )


def _own_paths(model: nn.Module) -> Iterator[str]:
    """The names of modules and tensors that are not an adapter's."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        yield path
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside += (path + ".",)
        else:
            yield from (name for name in (*module._parameters, *module._buffers))


def check_model(model: Any) -> None:
    """Raise ValueError for what is no model, and for a PeftModel that has adapters of this package already."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"`model` is {model!r}; it must be a model. Load it first: `AutoModelForCausalLM.from_pretrained(...)`."
        )
    if isinstance(model, PeftModel) and any(isinstance(module, MergingLayer) for module in model.modules()):
        raise ValueError(
            f"`model` is a PeftModel already, with the adapters {sorted(model.peft_config)}. To train on, use it as it "
            "is; for another adapter, `model.add_adapter(name, config)` and `model.set_adapter(name)`. For another "
            "method or grid, load the float model again."
        )


def check_base(model: nn.Module, config: Any) -> None:
    """Raise ValueError if the model is quantized already, in a way that training cannot start from."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    method = getattr(method, "value", method)  # transformers' enum
    if any(isinstance(module, (BaseTunerLayer, *MERGED)) for module in model.modules()):
        return  # layer by layer: `check_targets`
    if isinstance(method, str):
        how = (
            f"Load it with `peft_lrqat.load_quantized(...)`, which keeps its integers for {config.method} to start from"
            if method in METHODS and method != "bitnet"  # whose inputs are rounded
            else "Load the float model"
        )
        raise ValueError(
            f"The base model is already quantized ({method}), but {config.method} starts from float "
            f"weights or from integers. {how}; for a model that was dequantized on loading (GGUF), delete "
            "`model.config.quantization_config`."
        )
    record = Record.of(getattr(model, "config", None))
    if record is not None and record.grid != config.stored_grid:
        raise ValueError(
            f"The base model was quantized to {record.grid.describe()} (`peft_lrqat` in its config.json), and is float "
            "now: transformers decompresses weights with zero points, and some others. The configuration would round "
            f"them once more, to {config.stored_grid.describe()}. Load it with `peft_lrqat.load_quantized(...)`, whose "
            "integers training starts from, or give the options of its own grid; if another grid is meant, delete "
            "`model.config.peft_lrqat`."
        )


def check_targets(model: nn.Module, targets: dict[str, nn.Module], config: Any) -> dict[str, int]:
    """Read every targeted weight once, and raise ValueError if a module cannot be converted.

    Returns:
        Name -> a number that tells its weight from another (`fingerprint.py`).
    """
    check_layers(model, targets, config)
    return {name: _checksum(name, module) for name, module in targets.items()}


def check_layers(model: nn.Module, targets: dict[str, nn.Module], config: Any, *, loading: bool = False) -> None:
    """Raise ValueError if a module cannot be converted, whatever the values of its weight.

    Args:
        loading: the weights are about to be loaded, all or a block at a time, and to be tied where the model says so.
    """
    if single := sorted(inside_experts(model) & targets.keys()):
        raise ValueError(
            f"`target_modules` names {len(single)} layers of single experts of a quantized model, e.g. {single[0]!r}, "
            "but the experts of a layer are trained together. Name all parts of them, or leave them out with "
            r"`exclude_modules=r'.*\.experts\..*'`."
        )
    if compiled := next((name for name in targets if "_orig_mod" in name.split(".")), None):
        raise ValueError(
            f"Module {compiled!r} is inside of a compiled module (`torch.compile(module)`), which gives all names in "
            "it another beginning: no file of the adapter, or of the merged model, would fit a model that is not "
            "compiled. Adapt the model first and compile it then (`torch.compile(get_peft_model(...))`, or the "
            "Trainer's `torch_compile=True`), or compile it with `model.compile()`, which changes no names."
        )
    _check_readers(model, targets, config)
    owners = _owners(model)
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {}) if loading else {}
    widths: dict[str, int] = {}
    for name, module in targets.items():
        where = f"module {name!r} ({type(module).__name__})"
        if isinstance(module, MergingLayer):
            continue
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"`target_modules` names {where}, which carries an adapter of another method. Unload that first, or "
                "leave the module out with `exclude_modules`."
            )
        if isinstance(module, FrozenWeight):  # quantized while it was loaded
            check_not_offloaded(module, where)
            _check_scale_dtype(module.compute_dtype, config, where)
            continue
        _check_kind(module, config, where)
        check_plain(module, where)
        if not loading:
            check_not_offloaded(module, where)
        if isinstance(module, QuantizedLinear):
            _check_quantized(module, config, where)
        else:
            weight = _float_weight(module, config, where, loading)
            _check_scale_dtype(weight.dtype, config, where)
            _check_untied(name, where, owners[id(weight)] + _tied_to(f"{name}.weight", ties))
            widths[where] = weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]
    common = math.gcd(*widths.values())
    for where, width in widths.items():
        config.grid.check_divides(width, where, common)


def check_writable(model: nn.Module, targets: dict[str, nn.Module], method: str) -> None:
    """Raise ValueError if `save_pretrained` could not write what merging leaves of a targeted module."""
    linear = [name for name, module in targets.items() if type(module) is nn.Linear]
    if found := unwritable(model, linear):
        raise ValueError(
            f"Files of {type(model).__name__} hold the weight of module {found!r} in another order than the model, and "
            f"transformers does not bring integers into it: what {method} trains could not be saved. Leave such "
            "modules out with `exclude_modules` (often a vision tower)."
        )


def check_activations(targets: dict[str, nn.Module], config: Any) -> None:
    """Raise ValueError if the input of a targeted module cannot be rounded as `config` says, or if it names none."""
    for name, module in targets.items():
        activations = config.activations_of(name)
        if activations is None:
            continue
        if kind := _saved_dense(module):
            raise ValueError(
                f"`act_bits` is {activations.bits}, but module {name!r} is {kind}, for which no checkpoint format "
                f"quantizes activations. Leave `act_bits` out, or give `act_bits_pattern={{{name!r}: None}}`."
            )
        width: Any = module.in_features
        if activations.group_size > 0 and width % activations.group_size:
            raise ValueError(
                f"`act_group_size` is {activations.group_size}, which does not divide the {width} input features of "
                f"module {name!r}. Use a divisor, or None for one scale a token."
            )
    for key in config.act_bits_pattern or {}:
        if not any(get_pattern_key([key], name) == key for name in targets):
            raise ValueError(
                f"`act_bits_pattern` has {key!r}, but that is the name of no targeted module (it is matched as LoRA's "
                f"`rank_pattern` is: a regular expression for the end of the name). Modules are called "
                f"{', '.join(map(repr, list(targets)[:3]))} ..."
            )


def check_cache(targets: dict[str, nn.Module], config: Any) -> None:
    """Raise ValueError if no file of the merged model would say that its KV cache is rounded."""
    if config.kv_bits is not None and targets and all(map(_saved_dense, targets.values())):
        name, module = next(iter(targets.items()))
        raise ValueError(
            f"`kv_bits` is {config.kv_bits}, but {name!r} is {_saved_dense(module)}, as is every targeted module: the "
            "merged model is saved as floats then, and config.json says nothing of a rounded KV cache. Leave `kv_bits` "
            "out."
        )


#: Modules of torch that read weights of their layers instead of calling these (the second in evaluations only).
_READERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}


def _check_readers(model: nn.Module, targets: dict[str, nn.Module], config: Any) -> None:
    """Raise ValueError if the input of a layer is to be rounded whose weight one of `_READERS` reads."""
    for path, module in model.named_modules():
        read = next((layers for kind, layers in _READERS.items() if isinstance(module, kind)), ())
        for name in (f"{path}.{layer}".lstrip(".") for layer in read):
            if name in targets and config.activations_of(name) is not None:
                raise ValueError(
                    f"`act_bits` rounds the input of module {name!r}, but {type(module).__name__} reads the layer's "
                    "weight instead of calling it, so that its input would stay float. Leave such layers out with "
                    f"`exclude_modules`, or give `act_bits_pattern={{{name!r}: None}}`."
                )


def _saved_dense(module: nn.Module) -> str:
    """What kind of module it is, if merging leaves it dense; else nothing."""
    if isinstance(module, nn.Embedding) or getattr(module, "kind", None) == "embedding":
        return "an embedding"
    transposed = getattr(getattr(module, "frozen", module), "transposed", isinstance(module, Conv1D))
    return "a Conv1D (GPT-2)" if transposed else ""


def _tied_to(weight: str, ties: dict[str, str]) -> list[str]:
    """The modules with whose weight a weight will be tied.

    Args:
        ties: name of a weight -> name of the one that it will be.
    """
    others = [source for target, source in ties.items() if target == weight]
    return [name.rpartition(".")[0] for name in (*others, *(t for t, source in ties.items() if source == weight))]


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Identity of a parameter -> the modules whose weight it is, and parameters of other names that it is; a slot of a
    shared parent counts once.
    """
    owners: dict[int, list[str]] = {}
    for parent_name, parent in model.named_modules():
        slots = [
            (name, child._parameters.get("weight")) for name, child in parent._modules.items() if child is not None
        ]
        slots += [(name, parameter) for name, parameter in parent._parameters.items() if name != "weight"]
        for name, parameter in slots:
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{parent_name}.{name}".lstrip("."))
    return owners


def _check_kind(module: nn.Module, config: Any, where: str) -> None:
    if not isinstance(module, config.quantizes):
        names = [kind.__name__ if kind is Conv1D else f"nn.{kind.__name__}" for kind in config.quantizes]
        raise ValueError(
            f"`target_modules` names {where}, but {config.method} quantizes {', '.join(names[:-1])} and {names[-1]} "
            "only. Use 'all-linear', or leave the module out with `exclude_modules`."
        )
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        raise ValueError(
            f"`target_modules` names {where}, whose `max_norm` or `sparse` needs a float table. Leave it out, or "
            "train it in float with `modules_to_save` or `trainable_token_indices`."
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


def _float_weight(module: nn.Module, config: Any, where: str, loading: bool) -> torch.Tensor:
    """The weight of a module, which is a plain float tensor, with values unless `loading`; ValueError if it is not."""
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or weight.dtype not in _FLOATS:
        kind = "no float weight (it seems to be quantized)" if weight is None else f"a weight of dtype {weight.dtype}"
        raise ValueError(
            f"{where} has {kind}; {config.method} needs float32, bfloat16 or float16 weights. Load the float model."
        )
    if hasattr(weight, "full_tensor"):
        raise ValueError(
            f"The weight of {where} is sharded (a DTensor). Adapt the whole model first, then shard it with "
            "`fully_shard`, or let accelerate do so; tensor-parallel models are not supported."
        )
    if type(weight.data) is not torch.Tensor:
        raise ValueError(
            f"The weight of {where} is a {type(weight.data).__name__}, no plain tensor: it seems to be quantized "
            "already. Load the float model."
        )
    if weight.device.type == "meta" and not loading:
        raise ValueError(
            f"The weight of {where} is on the meta device, so there is nothing to quantize. Load the model with "
            "its weights (without `init_empty_weights`, and without offloading this module to disk)."
        )
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(
            f"The weight of {where} has shape {tuple(weight.shape)}, so there is nothing to quantize. Leave the module "
            "out with `exclude_modules`; a model that DeepSpeed ZeRO-3 has partitioned must be adapted before."
        )
    return weight


def _check_scale_dtype(dtype: torch.dtype, config: Any, where: str) -> None:
    if config.scale_dtype in _STORABLE[dtype]:
        return
    if config.scale_dtype == "fp16":  # GGUF keeps scales in fp16, whatever the model is in
        warnings.warn(
            f"`scale_dtype` is 'fp16', but the model is {dtype}, in which a checkpoint cannot store such "
            "scales. Training uses them exactly, and `export(..., format='gguf')` writes them exactly, without "
            "merging. Before merging, call `model.float()`.",
            stacklevel=2,
        )
    else:
        raise ValueError(
            f"`scale_dtype` is {config.scale_dtype!r}, but {where} is {dtype}, and so will the checkpoint's "
            f"scales be. Allowed for it: {_STORABLE[dtype]}; 'auto' is exact everywhere."
        )


def _check_untied(name: str, where: str, owners: list[str]) -> None:
    shared = [other for other in owners if other != name]
    if shared:
        raise ValueError(
            f"The weight of {where} is tied to {shared[0]!r}, which would stay float. Leave {name!r} out of "
            "`target_modules`, or untie it first: set `model.config.tie_word_embeddings = False` and give it a "
            "clone of the weight as its own nn.Parameter."
        )


def _checksum(name: str, module: Any) -> int:
    if isinstance(module, MergingLayer):
        return module.frozen.source_checksum
    if isinstance(module, FrozenWeight):
        return module.source_checksum  # type: ignore[return-value]  # a weight without is not quantized on loading
    if isinstance(module, QuantizedLinear):
        return codes_checksum(module.grid_tensor())
    checksum = float_checksum(module.weight.t() if isinstance(module, Conv1D) else module.weight)
    if checksum is None:
        raise ValueError(
            f"The weight of module {name!r} ({type(module).__name__}) holds NaN or infinite values. Load an intact "
            "checkpoint, or repair the weight before adapting the model."
        )
    return checksum
