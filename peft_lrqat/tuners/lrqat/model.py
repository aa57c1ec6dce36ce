"""`LRQATModel`: PEFT's tuner class for LR-QAT."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...checkpoint.adopt import adopt_compressed_tensors
from ...modules.experts import ExpertStack
from ...modules.packed import QuantizedStack
from ..common.model import QuantizingModel
from ..common.quantized_base import is_fixed_point
from .config import BY_CHANNEL, LRQATConfig
from .embedding import LRQATEmbedding
from .experts import FrozenExperts, LRQATExpertLinear
from .layer import LRQATLayer, LRQATLinear
from .quantized_base import adopt_base


class LRQATModel(QuantizingModel):
    """The tuner of LR-QAT: PEFT's `LoraModel`, with layers whose adapters lie inside the rounding.

    `get_peft_model(model, LRQATConfig(...))` makes it, and `peft_model.base_model` is it. Its methods are PEFT's.
    `merge_and_unload()` gives the model with the trained integers; `unload()` gives the one at step 0, in float.

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_lrqat import LRQATConfig, LRQATModel
        >>> model = get_peft_model(base, LRQATConfig(bits=4, group_size=128))
        >>> isinstance(model.base_model, LRQATModel)
        True
        >>> merged = model.merge_and_unload()
        >>> merged.save_pretrained("merged")  # compressed-tensors, which transformers and vLLM load
    """

    tuner_layer_cls = LRQATLayer
    config_cls = LRQATConfig
    frozen_experts = FrozenExperts
    shared_options = (
        "bits",
        "group_size",
        "symmetric",
        "downcast",
        "range_method",
        "range_p",
        "scale_dtype",
        "signed_scales",
        "act_bits",
        "act_group_size",
        "act_bits_pattern",
        "act_rule",
        "kv_bits",
        "kv_rule",
        "act_scale",
    )
    _combining: tuple[str, ...] = ()  # the adapters, within add_weighted_adapter

    def _adopt_base(self, model: nn.Module, config: LRQATConfig, state_dict: dict | None) -> bool:
        if self._combining:  # PEFT made this config from the first adapter's, which may have other targets
            config.require_any_base()
            config.learn_scales = max(
                (self.peft_config[name].learn_scales for name in self._combining), key=(False, True, BY_CHANNEL).index
            )
            config.use_rslora = False  # with PEFT's lora_alpha = r the factors are taken as they are
        adopted = adopt_compressed_tensors(model)
        adopt_base(model, self._targets(model, config, state_dict), config)
        return adopted

    def _check(self, model: nn.Module, targets: dict[str, nn.Module], config: LRQATConfig) -> dict[str, int]:
        checksums = super()._check(model, targets, config)
        config.forget_unmatched(targets)
        return checksums

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        config.conversion_device()  # an early error
        if config._custom_modules:
            raise ValueError(
                "Layers registered with `_register_custom_module` replace LoRA's own layers; LR-QAT has no use for "
                "them. Make the configuration without them."
            )

    def _check_shared(self, config: LRQATConfig, others: dict[str, Any]) -> None:
        super()._check_shared(config, others)
        for name, other in others.items():
            if isinstance(other, LRQATConfig) and other.adapter_unit != config.adapter_unit:
                raise ValueError(
                    f"The adapters of a layer add up in one unit, but with `learn_scales={config.learn_scales!r}` the "
                    f"new one counts {config.adapter_unit}, and adapter {name!r} (`learn_scales="
                    f"{other.learn_scales!r}`) counts {other.adapter_unit}. Give both the same `learn_scales`, or load "
                    "this one on a fresh copy of the model."
                )

    def _create_new_module(  # type: ignore[override]  # PEFT's is static, and called on the instance
        self, lora_config: LRQATConfig, adapter_name: str, target: Any, **kwargs: Any
    ) -> nn.Module:
        for unused in ("device_map", "parameter_name", "tied_adapter", "get_apply_tensor_subclass"):
            kwargs.pop(unused, None)
        kind: type[LRQATLinear] = LRQATEmbedding if isinstance(target, nn.Embedding) else LRQATLinear
        if isinstance(target, ExpertStack | QuantizedStack | FrozenExperts):
            kind = LRQATExpertLinear
        if is_fixed_point(self.model, target, lora_config):
            kwargs["fixed_point"] = True
        checksum = self._source_checksum(kwargs["target_name"])
        return kind(target, adapter_name, config=lora_config, source_checksum=checksum, **kwargs)

    # -- state dicts

    @classmethod
    def _adapter_tensors(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        found = super()._adapter_tensors(model, config, adapter_name, state_dict, unwanted_adapter_names)
        _warn_of_shards(found, adapter_name)
        return found

    # -- adapters

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Combine adapters as PEFT's `add_weighted_adapter` does.

        The products A B are combined as `combination_type` says, in grid steps. The scale shifts, which are no matrices
        of low rank, are always combined linearly: shift = sum of weight * shift. Adapters of rank 0 have nothing else.

        Raises:
            ValueError: there is an adapter of that name (PEFT would leave it as it is, whatever the weights are);
                `weights` are not as many as `adapters`; the model has experts, and the adapters factors; or some layers
                of the adapters have factors, and some not.
        """
        if adapter_name in self.peft_config:
            raise ValueError(
                f"There is an adapter {adapter_name!r} already. Choose another name, or `model.delete_adapter("
                f"{adapter_name!r})` first."
            )
        if len(adapters) != len(weights):
            raise ValueError(f"`weights` has {len(weights)} numbers for {len(adapters)} adapters; give one for each.")
        known = [self.peft_config[name] for name in adapters if name in self.peft_config]  # PEFT refuses the others
        ranks: set[int] = set().union(*(config.ranks for config in known))
        if 0 in ranks and any(ranks):
            raise ValueError(
                "`add_weighted_adapter` combines low-rank factors layer by layer, but adapters of rank 0 have none, "
                f"and the ranks of {adapters} are {sorted(ranks)}. Combine adapters that all have factors, or none; or "
                "activate several (`model.base_model.set_adapter([...])`), which adds them up."
            )
        if any(ranks) and any(isinstance(layer, LRQATExpertLinear) for layer in self.modules()):
            raise ValueError(
                "`add_weighted_adapter` combines the factors of single layers, but the factors of all experts of a "
                "layer lie in one. Activate several adapters instead (`model.base_model.set_adapter([...])`), which "
                "adds them up."
            )
        self._combining = tuple(adapters)
        try:
            if known and not any(ranks):
                self._add_without_factors(adapters, adapter_name, *args, **kwargs)
            else:
                super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        except BaseException:
            if adapter_name in self.peft_config:  # PEFT adds it before it combines the others
                self.delete_adapter(adapter_name)
            raise
        finally:
            del self._combining
        for layer in self.modules():
            if isinstance(layer, LRQATLayer) and adapter_name in layer.lora_scale_shift:
                target = layer.lora_scale_shift[adapter_name].weight
                target.data.zero_()
                for adapter, weight in zip(adapters, weights, strict=True):
                    if adapter in layer.lora_scale_shift:
                        target.data.add_(layer.lora_scale_shift[adapter].weight.data.to(target.dtype), alpha=weight)

    def _add_without_factors(
        self, adapters: list[str], adapter_name: str, combination_type: str = "svd", *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter of rank 0 to all layers of others of rank 0."""
        *_, modules = self._check_add_weighted_adapter(adapters, combination_type, None)
        first = self.peft_config[adapters[0]]
        self.peft_config[adapter_name] = replace(first, target_modules=modules, rank_pattern={}, alpha_pattern={})
        self.inject_adapter(self.model, adapter_name)


def _warn_of_shards(state_dict: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Warn of flat or empty matrices, which a model has that ZeRO-3 or FSDP1 has sharded and nobody gathered."""
    matrices = (".lora_A", ".lora_B", ".lora_scale_shift")
    flat = [
        name
        for name, value in state_dict.items()
        if any(part in name for part in matrices) and (value.ndim < 2 or not value.numel())
    ]
    if flat:
        warnings.warn(
            f"{len(flat)} matrices of adapter {adapter_name!r} are flat or empty, e.g. {flat[0]!r}: these are "
            "ZeRO-3 / FSDP shards, and the file could not be loaded. Gather the model before saving it (DeepSpeed: "
            "`stage3_gather_16bit_weights_on_model_save`; FSDP: a full state dict).",
            stacklevel=2,
        )
