"""`LRQATModel`: PEFT's tuner class for LR-QAT."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.save_and_load import _validate_lora_adapter_state_dict
from torch import nn

from ...checkpoint.adopt import adopt_compressed_tensors
from ..common.model import QuantizingModel
from .config import LRQATConfig
from .embedding import LRQATEmbedding
from .layer import LRQATLayer, LRQATLinear
from .quantized_base import adopt_base


class LRQATModel(QuantizingModel):
    """Puts LR-QAT adapters into a model; made by `get_peft_model(model, LRQATConfig(...))`."""

    tuner_layer_cls = LRQATLayer
    config_cls = LRQATConfig
    shared_options = (
        "bits",
        "group_size",
        "symmetric",
        "downcast",
        "range_method",
        "range_p",
        "scale_dtype",
        "act_bits",
    )
    _combining = False  # within add_weighted_adapter

    def _before_checks(self, model: nn.Module, config: LRQATConfig, state_dict: dict | None) -> None:
        if self._combining:  # PEFT made this config from another adapter's, which may have other targets
            config._required_fingerprint = None
        adopt_compressed_tensors(model)
        adopt_base(self._targets(model, config, state_dict), config)

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        config.conversion_device()  # an early error
        if config._custom_modules:
            raise ValueError(
                "Layers registered with `_register_custom_module` replace LoRA's own layers; LR-QAT has no use for "
                "them. Make the configuration without them."
            )

    @staticmethod
    def _create_new_module(lora_config: LRQATConfig, adapter_name: str, target: Any, **kwargs: Any) -> nn.Module:
        for unused in ("device_map", "parameter_name", "tied_adapter", "get_apply_tensor_subclass"):
            kwargs.pop(unused, None)
        kind = LRQATEmbedding if isinstance(target, nn.Embedding) else LRQATLinear
        return kind(target, adapter_name, config=lora_config, **kwargs)

    def _prepare_merge(self, layer: Any, config: LRQATConfig) -> None:
        if isinstance(layer, LRQATLinear):
            layer.container_bits = config.stored_bits

    # -- state dicts

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # warns about flat or empty lora_A / lora_B, which an ungathered ZeRO-3 or FSDP1 model has
        _validate_lora_adapter_state_dict(found, adapter_name=adapter_name)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
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
