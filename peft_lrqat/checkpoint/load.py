"""`load_quantized`: a quantized checkpoint as a model that holds its integers, and no floats.

transformers can load the same files, but keeps of them what its kernels want: GPTQ and AWQ need gptqmodel, whose
kernels repack the codes; asymmetric compressed-tensors files become floats on the way. Here, transformers loads the
tensors as they are stored (it finds files, shards and devices), into placeholders (`_Stored`); then each becomes the
very layer that merging makes. Nothing but safetensors is read. `formats/reading.py` knows what the tensors mean.
"""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..arguments import check_flags
from ..formats import reading
from ..formats.record import Record
from ..formats.scheme import Scheme
from ..formats.shards import DTYPES, Entry, read_headers
from ..grid import Grid
from ..modules.architecture import expose_experts, joining, joins_experts, loaded_modules, own_names
from ..modules.carry import carry_hooks
from ..modules.experts import is_stacked
from ..modules.kv_cache import round_cache
from ..modules.packed import describe, merged_layer
from .code import class_of
from .hub import check_place

_METHOD = "peft_lrqat"  # transformers' name for our reader; it is in no file
#: Those of `from_pretrained`'s options that a configuration is found by.
HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def load_quantized(pretrained_model_name_or_path: str | os.PathLike, *, model_class: Any = None, **kwargs: Any) -> Any:
    """Load a quantized checkpoint as integers, to train LR-QAT on it or to save it in another format.

    The checkpoint may be of compressed-tensors (integers of 2 to 8 bits, weight-only or W8A8), GPTQ (2, 3, 4 or 8
    bits), AWQ ("gemm"), transformers' BitNet, or torchao's `IntxUnpackedToInt8Tensor`. Their packages need not be
    installed. The model takes the memory of its file: no quantized weight is ever a float.

    Args:
        pretrained_model_name_or_path (str | os.PathLike): a folder, or a repository of the Hub, with safetensors files.
        model_class (Any): a model's class or an `AutoModel...`. None: the class that config.json names, or
            `AutoModelForCausalLM` if it names none.
        **kwargs (Any): as for `from_pretrained` (`dtype`, `device_map`, `revision`, `trust_remote_code` ...).

    Returns:
        The model. Its quantized layers are `QuantizedLinear`s, or `Int8Linear` and `BitNetLinear` where inputs are
        rounded. `save_pretrained` writes compressed-tensors (or BitNet's format). With `output_loading_info=True`, a
        pair of the model and transformers' dictionary.

    Raises:
        ValueError: the checkpoint is not quantized, or in a way that has no exact counterpart, or it is incomplete or
            damaged. The message says which.
        FileNotFoundError: there is no such folder, and no repository is called so.

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_lrqat import LRQATConfig, load_quantized
        >>> quantized = load_quantized("path/or/repo-GPTQ")
        >>> trained = get_peft_model(quantized, LRQATConfig(r=16, task_type="CAUSAL_LM"))
        >>> config = trained.peft_config["default"]  # what was left open is the checkpoint's
        >>> config.bits, config.group_size
        (4, 128)
    """
    if "quantization_config" in kwargs:
        raise ValueError("`quantization_config` is not for `load_quantized`: the checkpoint's own one is used.")
    if not isinstance(pretrained_model_name_or_path, (str, os.PathLike)):
        given = pretrained_model_name_or_path
        raise ValueError(
            f"`pretrained_model_name_or_path` is {given!r:.80}; it must be a folder, or the name "
            "of a repository of the Hub."
        )
    if model_class is not None and not hasattr(model_class, "from_pretrained"):
        raise ValueError(
            f"`model_class` is {model_class!r}; it must be a model's class or an `AutoModel...` of transformers, or "
            "None."
        )
    if kwargs.get("trust_remote_code") is not None:
        check_flags(trust_remote_code=kwargs["trust_remote_code"])
    trusted = kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))  # None: transformers would ask
    config = copy.deepcopy(kwargs.pop("config", None))
    if config is None:
        hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        check_place(pretrained_model_name_or_path)
        _refuse_others(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub)
    quantization = getattr(config, "quantization_config", None)
    quantization = quantization if quantization is None or isinstance(quantization, dict) else quantization.to_dict()
    if quantization is None:
        raise ValueError(
            f"config.json of {str(pretrained_model_name_or_path)!r} has no `quantization_config`: it is a float model. "
            "Load it with from_pretrained."
        )
    if quantization.get("quant_method") != "torchao":  # which describes its layers in the files themselves
        reading.describe(quantization)  # refuses before anything is downloaded
    reading.cache_rounding(quantization, Record.of(config))
    config.quantization_config = {"quant_method": _METHOD, "stored": quantization}
    kwargs.pop("use_safetensors", None)
    model_class = model_class or class_of(config, trusted) or AutoModelForCausalLM
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = model_class.from_pretrained(
        pretrained_model_name_or_path, config=config, use_safetensors=True, output_loading_info=True, **kwargs
    )
    # another class than the checkpoint's may have a head of its own, which transformers says is new
    own = type(model).__name__ in (config.architectures or [type(model).__name__])
    prefix = "" if own else model.base_model_prefix + "."
    if missing := sorted(name for name in info["missing_keys"] if name.startswith(prefix)):
        raise ValueError(
            f"{len(missing)} tensors of {type(model).__name__} are missing in {str(pretrained_model_name_or_path)!r}, "
            f"e.g. {', '.join(missing[:3])}. The checkpoint is incomplete: download or write it again."
        )
    return (model, info) if wants_info else model


def _refuse_others(folder: Path) -> None:
    """Raise ValueError for GGUF, for the folder of an adapter, and for one without a model: transformers would only say
    that it does not know the model.
    """
    without = folder.is_dir() and not (folder / "config.json").is_file()
    if folder.suffix == ".gguf" or (without and any(file.suffix == ".gguf" for file in folder.iterdir())):
        raise ValueError(
            f"{str(folder)!r} is GGUF, which `load_quantized` does not read. Give the checkpoint or the adapter that "
            "it was written from; transformers reads it as floats (`from_pretrained(folder, gguf_file=...)`)."
        )
    if without and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{str(folder)!r} holds an adapter, and no checkpoint. Load it on its base with "
            "`PeftModel.from_pretrained`, or give the folder of a merged model."
        )
    if without:
        raise ValueError(f"The folder {str(folder)!r} has no config.json, so it is no checkpoint of a model.")


class _Stored(nn.Module):
    """A linear layer's tensors as the file has them."""

    def __init__(self, linear: nn.Linear, tensors: dict[str, Entry]) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.names = [name for name in tensors if name != "bias"]
        for name in self.names:
            entry = tensors[name]
            if entry.dtype not in DTYPES:
                raise ValueError(f"`{name}` of a layer is stored as {entry.dtype}, which cannot be read here.")
            self.register_buffer(name, torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta"))
        # GPTQ files hold a bias of zeros for layers that have none; it is loaded and dropped
        self.bias, self.wants_bias = None, linear.bias is not None
        if "bias" in tensors:
            shape = tensors["bias"].shape
            self.bias = nn.Parameter(torch.empty(shape, dtype=linear.weight.dtype, device="meta"), requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and name not in self.__dict__["names"]:  # for models that initialize it, to no effect
            weight = torch.empty(self.out_features, self.in_features, device="meta")
            weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark
            return weight
        return super().__getattr__(name)

    def finish(self, name: str, scheme: Scheme, recorded: Grid | None, dtype: torch.dtype) -> nn.Module:
        """The layer that the tensors stand for.

        Args:
            recorded: the grid that config.json records for the layer, if this package wrote it; else None.
            dtype: of the float layer.
        """
        tensors: dict[str, torch.Tensor] = {key: self.get_buffer(key) for key in self.names}
        if any(tensor.is_meta for tensor in tensors.values()):
            raise ValueError(
                f"Layer {name!r} was offloaded to disk, where its integers cannot be read. Use a `device_map` that "
                "keeps the model in memory; it takes no more than the file."
            )
        if not self.wants_bias and self.bias is not None and self.bias.any():
            raise ValueError(f"The file holds a bias for layer {name!r}, but the model's layer has none.")
        weight = reading.read(scheme, tensors, self.out_features, self.in_features, name, recorded)
        return merged_layer(
            weight,
            self.bias if self.wants_bias else None,
            scheme.bits,
            dtype,
            activations=scheme.activations,
            file_scale_dtype=reading.scale_dtype(tensors, scheme.method),
        )


@register_quantization_config(_METHOD)
class _Config(QuantizationConfigMixin):
    def __init__(self, stored: dict[str, Any], **kwargs: Any) -> None:
        self.quant_method: Any = _METHOD  # transformers' annotation is the enum of its own methods
        self.stored = stored


@register_quantizer(_METHOD)
class _Reader(HfQuantizer):
    """Puts placeholders where the file has integers, and turns them into layers once they are loaded."""

    is_trainable = True
    quantization_config: _Config

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        entries, _, metadata = read_headers(checkpoint_files or [], _weight_map(checkpoint_files or []))
        self._scheme_of = reading.describe(self.quantization_config.stored, metadata)
        own = own_names(model, entries)
        self._renamings = own.renamings
        entries = {own.tensors.get(name, name): entry for name, entry in entries.items()}
        in_files = reading.quantized_modules(self.quantization_config.stored["quant_method"], entries)
        exposed = expose_experts(model, in_files)
        self._exposed = bool(exposed)
        self._float_experts = [name for name, module in model.named_modules() if is_stacked(module)]
        called = loaded_modules(model, in_files)
        self._file_names = {inside: own.modules.get(name, name) for name, inside in called.items()}
        stored = {inside: in_files[name] for name, inside in called.items()}
        modules = dict(model.named_modules())
        unknown = sorted(name for name in stored if not isinstance(modules.get(name), nn.Linear))
        if unknown or not stored:
            raise ValueError(
                f"The checkpoint holds quantized weights for {len(unknown)} modules that are no nn.Linear in "
                f"{type(model).__name__}, e.g. {unknown[:3]}."
                if unknown
                else "The checkpoint's safetensors files hold no quantized weight."
            )
        tied = model.all_tied_weights_keys or {}
        heads = sorted(name for name in stored if {name + ".weight"} & {*tied, *tied.values()})
        if heads:
            raise ValueError(
                f"The checkpoint holds quantized codes for {heads[0]!r}, whose weight is tied to another in "
                f"{type(model).__name__}. Untie it: set `tie_word_embeddings` to false in config.json."
            )
        self._dtype = kwargs.get("dtype") or model.dtype
        self._dtypes = _dtypes(model, self._dtype, {name: modules[name] for name in stored})
        for name, tensors in stored.items():
            scheme = self._scheme(name)
            reading.check_parts(scheme, tensors, name)
            if scheme.activations is not None and name.startswith(tuple(f"{experts}." for experts in exposed)):
                raise ValueError(
                    f"The checkpoint rounds the inputs of experts ({name!r}: {scheme.activations.describe()}), which "
                    "is not done here. Start from one whose experts have float inputs."
                )
            parent, _, last = name.rpartition(".")
            setattr(modules[parent], last, _Stored(modules[name], tensors))

    def update_weight_conversions(self, weight_conversions: Any, *args: Any) -> Any:
        """transformers' conversions while it loads, without those that join experts, which are layers here: these go on
        for the modules whose experts are floats in the file."""
        kept = [*self._renamings, *weight_conversions]
        if self._exposed:
            kept = [one for one in kept if not joins_experts(one)]
            joins = [one for one in weight_conversions if joins_experts(one)]
            kept += [joining(one, name) for name in self._float_experts for one in joins]
        return super().update_weight_conversions(kept, *args)

    def _scheme(self, name: str) -> Scheme:
        return self._scheme_of(*dict.fromkeys((self._file_names[name], name)))

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.remove_quantization_config(model)
        model.config._is_quantized = False
        if self._renamings:  # `save_pretrained` would revert them
            model._weight_conversions = [one for one in model._weight_conversions if one not in self._renamings]
        record = Record.of(model.config)
        rounded = []
        for name, module in list(model.named_modules()):
            if isinstance(module, _Stored):
                recorded = None if record is None else record.grid_of(self._file_names[name])
                layer: Any = module.finish(name, self._scheme(name), recorded, self._dtypes[name])
                replace_layer(model, name, layer)
                if layer.weight_scale.dtype != self._dtypes[name]:
                    rounded.append(name)
        if rounded:
            kept = model.get_submodule(rounded[0]).weight_scale.dtype
            warnings.warn(
                f"The scales of {len(rounded)} layers are {kept} numbers that {self._dtype} does not hold; they are "
                f"kept as {kept}. The model computes with them exactly, but a checkpoint in {self._dtype} cannot store "
                "them: before merging or saving, call `model.float()` (or load with dtype=torch.float32).",
                stacklevel=2,
            )
        if (cache := reading.cache_rounding(self.quantization_config.stored, record)) is not None:
            round_cache(model, cache, of_base=True)
        describe(model)
        return model


def _dtypes(model: Any, dtype: torch.dtype, layers: dict[str, Any]) -> dict[str, torch.dtype]:
    """Name of a layer -> the dtype that transformers would give its float weight: the model's, or one of its own.

    Args:
        dtype: the model's.
        layers: of a model without weights.
    """
    # private: what is kept in fp32, by patterns
    plan: dict[str, torch.dtype] = getattr(model, "_get_dtype_plan", lambda dtype: {})(dtype)

    def of(name: str) -> torch.dtype:
        found = (kept for part, kept in plan.items() if re.search(part.replace("*", ".*"), f"{name}.weight"))
        return next(found, layers[name].weight.dtype)

    return {name: of(name) for name in layers}


def _weight_map(files: list[str]) -> dict[str, str] | None:
    """What the index beside these files says, if they are the shards of one."""
    indices = {Path(file).with_name("model.safetensors.index.json") for file in files if "-of-" in Path(file).name}
    found = [json.loads(index.read_text(encoding="utf-8")) for index in indices if index.exists()]
    return found[0].get("weight_map") if len(found) == 1 else None


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the module of that name, with its hooks."""
    carry_hooks(model.get_submodule(name), layer)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
