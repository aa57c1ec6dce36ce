"""`LRQATModel`: PEFT's tuner class. What it adds to LoRA's: checks before anything is changed, and the checkpoint."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, _maybe_include_all_linear_layers
from peft.utils.save_and_load import _validate_lora_adapter_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint.compressed_tensors import quantization_config
from ..checkpoint.model_card import attach_card
from ..training.loss import restore_loss, use_lean_loss
from .base import packed_state_dict
from .config import LRQATConfig
from .embedding import LRQATEmbedding
from .layer import LRQATLayer, LRQATLinear
from .preflight import check_adapter_file, check_base, check_fingerprint, check_targets


class LRQATModel(LoraModel):
    """Puts LR-QAT adapters into a model; made by `get_peft_model(model, LRQATConfig(...))`.

    Conversion goes layer by layer: above the loaded model, it needs the memory of one layer.
    """

    tuner_layer_cls = LRQATLayer
    _combining = False  # within add_weighted_adapter
    peft_config: dict[str, Any]  # of LRQATConfig; PEFT's annotation, PeftConfig, does not know our fields

    # -- before anything is changed

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's `inject_adapter`, after every targeted module has been looked at.

        Raises:
            ValueError: the model or one of its targeted modules cannot be quantized as asked. Nothing was changed then.
        """
        config = self.peft_config[adapter_name]
        if self._combining:  # PEFT made this config from another adapter's, which may have other targets
            config._required_fingerprint = None
        self._check_new_adapter_config(config)
        try:
            targets = self._targets(model, config, kwargs.get("state_dict"))
            check_base(model)
            check_targets(model, targets, config)
            fingerprint = check_fingerprint(targets, config)
            check_adapter_file(targets, config)
        except ValueError:
            if len(self.peft_config) > 1:  # PEFT registers the adapter before it injects it
                del self.peft_config[adapter_name]
            raise
        config.base_fingerprint = fingerprint
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        use_lean_loss(model)

    def _targets(self, model: nn.Module, config: LRQATConfig, state_dict: dict | None) -> dict[str, nn.Module]:
        """The modules that `config` names, found as PEFT will find them."""
        plan: Any = copy.copy(config)
        plan = self._prepare_adapter_config(plan, self.get_model_config(model))
        plan = _maybe_include_all_linear_layers(plan, model)
        named = {name: module for name, module in model.named_modules() if name}
        if state_dict is not None:
            wanted = {key.rsplit("." + self.prefix, 1)[0] for key in state_dict}
            return {name: module for name, module in named.items() if name in wanted}
        inside = tuple(name + "." for name, module in named.items() if isinstance(module, BaseTunerLayer))
        return {
            name: module
            for name, module in named.items()
            if not name.startswith(inside)
            and (found := self._check_target_module_exists(plan, name))
            and not isinstance(found, _ExcludedModule)
        }

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if not isinstance(config, LRQATConfig):
            raise ValueError(f"LRQATModel needs an LRQATConfig, got {type(config).__name__}.")
        if config._custom_modules:
            raise ValueError(
                "Layers registered with `_register_custom_module` replace LoRA's own layers; LR-QAT has no use for "
                "them. Make the configuration without them."
            )
        for name, other in self.peft_config.items():
            if other is config or not isinstance(other, LRQATConfig):
                continue
            for option in ("bits", "group_size", "symmetric", "downcast", "range_method", "range_p", "scale_dtype"):
                new, old = getattr(config, option), getattr(other, option)
                if new != old:
                    raise ValueError(
                        f"All adapters of a model share its converted base, but the new adapter has {option}={new!r} "
                        f"and adapter {name!r} has {option}={old!r}. Load it on a fresh copy of the float model."
                    )

    @staticmethod
    def _create_new_module(lora_config: LRQATConfig, adapter_name: str, target: Any, **kwargs: Any) -> nn.Module:
        for unused in ("device_map", "parameter_name", "tied_adapter", "get_apply_tensor_subclass"):
            kwargs.pop(unused, None)
        kind = LRQATEmbedding if isinstance(target, nn.Embedding) else LRQATLinear
        return kind(target, adapter_name, config=lora_config, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        super()._replace_module(parent, child_name, new_module, child)
        if isinstance(new_module, LRQATLinear):
            # PEFT keeps every replaced module until all are replaced; with them it would keep the whole float model
            child.register_parameter("weight", None)

    # -- state dicts

    def state_dict(self, *args: Any, **kwargs: Any):
        """As stored: packed bases. (`model.base_model.model.state_dict()` gives float weights, as PEFT expects it.)"""
        with packed_state_dict():
            return super().state_dict(*args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # warns about flat or empty lora_A / lora_B, which an ungathered ZeRO-3 or FSDP1 model has
        _validate_lora_adapter_state_dict(found, adapter_name=adapter_name)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        with packed_state_dict():
            remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        _check_same_base(model, adapter_name, remapped)
        return remapped

    # -- adapters

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's `add_weighted_adapter`. The products A B are combined as `combination_type` says, in grid steps; the
        scale shifts, which are no matrices of low rank, always linearly: shift = sum of weight * shift."""
        if adapter_name in self.peft_config:
            return
        self._combining = True
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        finally:
            self._combining = False
        for layer in self.modules():
            if isinstance(layer, LRQATLayer) and adapter_name in layer.lora_scale_shift:
                target = layer.lora_scale_shift[adapter_name]
                target.data.zero_()
                for adapter, weight in zip(adapters, weights, strict=True):
                    if adapter in layer.lora_scale_shift:
                        target.data.add_(layer.lora_scale_shift[adapter].data.to(target.dtype), alpha=weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: rounding is not additive."""
        return False

    # -- the checkpoint

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:  # PEFT's annotation is None, but it returns the model
        config = self.peft_config[(adapter_names or self.active_adapters or list(self.peft_config))[0]]
        for layer in self.modules():
            if isinstance(layer, LRQATLinear):
                layer.container_bits = config.container_bits or config.bits
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        restore_loss(model)
        if merge and getattr(model, "config", None) is not None:
            bits = config.container_bits or config.bits
            if any(isinstance(module, Conv1D) for module in model.modules()):
                warnings.warn(
                    "compressed-tensors cannot pack Conv1D layers (GPT-2): their merged weights lie exactly on the "
                    "grid, but are saved as dense floats.",
                    stacklevel=2,
                )
            described = quantization_config(model, config.grid, bits)
            if described is not None:
                model.config.quantization_config = described
            attach_card(model, config)
        return model


def _check_same_base(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Refuse an adapter whose base converts to other integers than the base at hand."""
    for name, layer in model.named_modules():
        if not isinstance(layer, LRQATLinear) or adapter_name not in layer.lora_base_checksum:
            continue
        key = f"{name}.lora_base_checksum.{adapter_name}"
        here = layer.frozen.checksum()
        saved = (
            state_dict.setdefault(key, here) if layer.lora_base_checksum[adapter_name].is_meta else state_dict.get(key)
        )
        if saved is not None and int(saved) != int(here):
            raise ValueError(
                f"This adapter was trained on another base: the integers of module {name!r} differ. Load it on the "
                "same float model, in the same dtype, that it was trained on (see `base_model_name_or_path` in its "
                "adapter_config.json). It was not loaded, because on other integers it means something else."
            )
