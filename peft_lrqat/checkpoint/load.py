"""`load_quantized`: a checkpoint of compressed-tensors, GPTQ or AWQ as a model that holds its integers, and no floats.

transformers can load the same files, but keeps of them what its kernels want: GPTQ and AWQ need gptqmodel, whose
kernels repack the codes; asymmetric compressed-tensors files become floats on the way. Here, transformers loads the
tensors as they are stored (it finds files, shards and devices), into placeholders (`_Stored`); then each becomes a
`QuantizedLinear`, the very layer that merging makes. Nothing but safetensors is read.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..formats.reading import describe
from ..formats.record import Record
from ..formats.scheme import StoredLayer
from ..grid import Grid, GridTensor
from ..modules.packed import describe as describe_model
from ..modules.packed import merged_layer

_METHOD = "peft_lrqat"  # transformers' name for our reader; it is in no file
_HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


def load_quantized(
    pretrained_model_name_or_path: str | os.PathLike, *, model_class: Any = AutoModelForCausalLM, **kwargs: Any
) -> PreTrainedModel:
    """Load a quantized checkpoint as integers, to train LR-QAT on or to save in another format.

    The checkpoint may be of compressed-tensors (weight-only integers, 2 to 8 bits), GPTQ (2, 3, 4 or 8 bits) or AWQ
    ("gemm"). Neither compressed-tensors nor gptqmodel need be installed.

    Args:
        pretrained_model_name_or_path: a folder or a repository of the Hub, with safetensors files.
        model_class: what to load it with.
        **kwargs: as for `from_pretrained` (`dtype`, `device_map`, `revision`, ...).

    Returns:
        The model; its quantized layers are `QuantizedLinear`s. `save_pretrained` writes compressed-tensors.

    Raises:
        ValueError: the checkpoint is not quantized, or in a way that has no exact counterpart; the message says which.
    """
    if "quantization_config" in kwargs:
        raise ValueError("`quantization_config` is not for `load_quantized`: the checkpoint's own one is used.")
    config = kwargs.pop("config", None)
    if config is None:
        hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub)
    quantization = getattr(config, "quantization_config", None)
    quantization = quantization if quantization is None or isinstance(quantization, dict) else quantization.to_dict()
    if quantization is None:
        raise ValueError(
            f"config.json of {str(pretrained_model_name_or_path)!r} has no `quantization_config`: it is a float model. "
            "Load it with from_pretrained."
        )
    describe(quantization)  # refuses before anything is downloaded
    config.quantization_config = {"quant_method": _METHOD, "stored": quantization}
    return model_class.from_pretrained(pretrained_model_name_or_path, config=config, use_safetensors=True, **kwargs)


class _Stored(nn.Module):
    """A linear layer's tensors as the file has them."""

    def __init__(self, linear: nn.Linear, tensors: dict[str, tuple[list[int], torch.dtype]]) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.names = [name for name in tensors if name != "bias"]
        for name in self.names:
            shape, dtype = tensors[name]
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        # GPTQ files hold a bias of zeros for layers that have none; it is loaded and dropped
        self.bias, self.wants_bias = None, linear.bias is not None
        if "bias" in tensors:
            shape = tensors["bias"][0]
            self.bias = nn.Parameter(torch.empty(shape, dtype=linear.weight.dtype, device="meta"), requires_grad=False)

    def finish(self, name: str, stored: StoredLayer, recorded: Grid | None, dtype: torch.dtype) -> nn.Module:
        """The layer that the tensors stand for.

        Args:
            recorded: the grid that config.json records, if this package wrote it; else None.
            dtype: the model's.
        """
        tensors: dict[str, torch.Tensor] = {key: self.get_buffer(key) for key in self.names}
        if any(tensor.is_meta for tensor in tensors.values()):
            raise ValueError(
                f"Layer {name!r} was offloaded to disk, where its integers cannot be read. Use a `device_map` that "
                "keeps the model in memory; it takes no more than the file."
            )
        if not self.wants_bias and self.bias is not None and self.bias.any():
            raise ValueError(f"The file holds a bias for layer {name!r}, but the model's layer has none.")
        weight = narrowed(stored.read(tensors, self.out_features, self.in_features, name), recorded)
        scale_dtype = tensors["weight_scale" if "weight_scale" in tensors else "scales"].dtype
        bias = self.bias if self.wants_bias else None
        return merged_layer(weight, bias, stored.bits, dtype, file_scale_dtype=scale_dtype)


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
        stored = _quantized_modules(checkpoint_files or [])
        modules = dict(model.named_modules())
        unknown = sorted(name for name in stored if not isinstance(modules.get(name), nn.Linear))
        if unknown or not stored:
            raise ValueError(
                f"The checkpoint holds quantized weights for {len(unknown)} modules that are no nn.Linear in "
                f"{type(model).__name__}, e.g. {unknown[:3]} (experts of a mixture are not supported)."
                if unknown
                else "The checkpoint's safetensors files hold no quantized weight."
            )
        self._dtype = kwargs.get("dtype") or model.dtype
        for name, tensors in stored.items():
            parent, _, last = name.rpartition(".")
            setattr(modules[parent], last, _Stored(modules[name], tensors))

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.remove_quantization_config(model)
        model.config._is_quantized = False
        layer_of = describe(self.quantization_config.stored)
        record = Record.of(model.config)
        recorded = None if record is None else record.grid
        rounded = []
        for name, module in list(model.named_modules()):
            if isinstance(module, _Stored):
                layer: Any = module.finish(name, layer_of(name), recorded, self._dtype)
                replace_layer(model, name, layer)
                if layer.weight_scale.dtype != self._dtype:
                    rounded.append(name)
        if rounded:
            kept = model.get_submodule(rounded[0]).weight_scale.dtype
            warnings.warn(
                f"The scales of {len(rounded)} layers are {kept} numbers that {self._dtype} does not hold; they are "
                f"kept as {kept}. The model computes with them exactly, but a checkpoint in {self._dtype} cannot store "
                "them: before merging or saving, call `model.float()` (or load with dtype=torch.float32).",
                stacklevel=2,
            )
        describe_model(model)
        return model


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the module of that name, with its hook of accelerate if it has one."""
    old = model.get_submodule(name)
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        layer = add_hook_to_module(layer, hook)
    layer.train(old.training)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def narrowed(weight: GridTensor, grid: Grid | None) -> GridTensor:
    """The same weight on the grid that config.json records, where the file is wider: in bits, or by repeated scales."""
    if grid is None or weight.grid.symmetric != grid.symmetric:
        return weight
    values = [weight.codes] if weight.zero_point is None else [weight.codes, weight.zero_point]
    if any(bool((v < grid.qmin).any() or (v > grid.qmax).any()) for v in values):
        return weight
    rows, groups = grid.scale_shape(*weight.codes.shape)
    if weight.scale.shape[1] % groups:
        return weight

    def shared(stored: torch.Tensor) -> torch.Tensor | None:
        """(rows, groups), if the file holds the same value wherever the grid has a single one."""
        per_row = stored.view(stored.shape[0], groups, -1)
        first = per_row[:rows, :, :1]
        return first[..., 0].contiguous() if torch.equal(first.expand_as(per_row), per_row) else None

    scale, zero_point = shared(weight.scale), None if weight.zero_point is None else shared(weight.zero_point)
    if scale is None or (zero_point is None) != grid.symmetric:
        return weight
    return GridTensor(weight.codes, scale, zero_point, grid)


def _quantized_modules(files: list[str]) -> dict[str, dict[str, tuple[list[int], torch.dtype]]]:
    """Module name -> tensor name -> shape and dtype in the files, for the modules whose weight is integers."""
    found: dict[str, dict[str, tuple[list[int], torch.dtype]]] = defaultdict(dict)
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                module, _, name = key.rpartition(".")
                found[module][name] = (part.get_shape(), _DTYPES.get(part.get_dtype(), torch.float32))
    return {
        module: tensors
        for module, tensors in found.items()
        if tensors.keys() & {"weight_packed", "qweight"} or ("weight_scale" in tensors and "weight" in tensors)
    }
