"""What the tuners of this package share: checks before anything is changed, packed state dicts, and the checkpoint."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, _maybe_include_all_linear_layers
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...checkpoint.card import attach_card, merged_card
from ...modules.packed import MERGED, QuantizedLinear, describe
from .frozen import packed_state_dict
from .loss import restore_loss, use_lean_loss
from .preflight import check_adapter_file, check_base, check_fingerprint, check_targets


class QuantizingModel(LoraModel):
    """PEFT's LoRA tuner with another kind of layer, over a base that is converted to a grid.

    Conversion goes layer by layer: above the loaded model, it needs the memory of one layer.

    Attributes:
        config_cls: the configuration that the tuner takes.
        shared_options: its fields in which all adapters of a model must agree, because they share a converted base.
    """

    config_cls: Any
    shared_options: tuple[str, ...]
    peft_config: dict[str, Any]  # PEFT's annotation, PeftConfig, does not know our fields

    # -- before anything is changed

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's `inject_adapter`, after every targeted module has been looked at.

        Raises:
            ValueError: the model or one of its targeted modules cannot be quantized as asked. Nothing was changed then.
        """
        config = self.peft_config[adapter_name]
        try:
            self._before_checks(model, config, kwargs.get("state_dict"))
            self._check_new_adapter_config(config)
            targets = self._targets(model, config, kwargs.get("state_dict"))
            check_base(model, config)
            check_targets(model, targets, config)
            self._check_targets(targets, config)
            fingerprint = check_fingerprint(targets, config)
            check_adapter_file(targets, config)
        except ValueError:
            if len(self.peft_config) > 1:  # PEFT registers the adapter before it injects it
                del self.peft_config[adapter_name]
            raise
        config.base_fingerprint = fingerprint
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        use_lean_loss(model)

    def _before_checks(self, model: nn.Module, config: Any, state_dict: dict | None) -> None:
        """For subclasses: what a new adapter's configuration needs before it is looked at."""

    def _check_targets(self, targets: dict[str, nn.Module], config: Any) -> None:
        """Raise ValueError if a targeted module cannot be converted as `config` says; subclasses add to it."""
        for name, module in targets.items():
            if config.act_bits is not None and isinstance(module, Conv1D | nn.Embedding):
                kind = "a Conv1D (GPT-2)" if isinstance(module, Conv1D) else "an embedding"
                raise ValueError(
                    f"`act_bits` is {config.act_bits}, but module {name!r} is {kind}, for which no checkpoint format "
                    "quantizes activations. Leave `act_bits` out."
                )

    @classmethod
    def find_targets(cls, model: nn.Module, config: Any) -> dict[str, nn.Module]:
        """Name -> module of what `config` names in a model; raises ValueError if they cannot be quantized."""
        finder = cls.__new__(cls)  # PEFT's methods for this read nothing that __init__ sets
        nn.Module.__init__(finder)
        targets = finder._targets(model, config, None)
        check_base(model, config)
        check_targets(model, targets, config)
        return targets

    def _targets(self, model: nn.Module, config: Any, state_dict: dict | None) -> dict[str, nn.Module]:
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
        if not isinstance(config, self.config_cls):
            raise ValueError(f"{type(self).__name__} needs a {self.config_cls.__name__}, got {type(config).__name__}.")
        for name, other in self.peft_config.items():
            if other is config or not isinstance(other, self.config_cls):
                continue
            for option in self.shared_options:
                new, old = getattr(config, option), getattr(other, option)
                if new != old:
                    raise ValueError(
                        f"All adapters of a model share its converted base, but the new adapter has {option}={new!r} "
                        f"and adapter {name!r} has {option}={old!r}. Load it on a fresh copy of the float model."
                    )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        packed = isinstance(child, QuantizedLinear)
        if packed:  # PEFT asks the first of `qweight` and `weight` for its device, and `weight` would be built for that
            child.qweight = child.weight_packed
        super()._replace_module(parent, child_name, new_module, child)
        if packed and isinstance(new_module, BaseTunerLayer):
            child._buffers.clear()
            del child.qweight
        elif isinstance(new_module, BaseTunerLayer):
            # PEFT keeps every replaced module until all are replaced; with them it would keep the whole float model
            child.register_parameter("weight", None)

    # -- state dicts

    def state_dict(self, *args: Any, **kwargs: Any):
        """As stored: packed bases. (`model.base_model.model.state_dict()` gives float weights, as PEFT expects it.)"""
        with packed_state_dict():
            return super().state_dict(*args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        with packed_state_dict():
            return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: rounding is not additive."""
        return False

    # -- the checkpoint

    def _prepare_merge(self, layer: Any, config: Any) -> None:
        """For subclasses: tell a layer with which configuration it will be merged."""

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:  # PEFT's annotation is None, but it returns the model
        config = self.peft_config[(adapter_names or self.active_adapters or list(self.peft_config))[0]]
        for layer in self.modules():
            if isinstance(layer, self.tuner_layer_cls):
                self._prepare_merge(layer, config)
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        restore_loss(model)
        if merge and getattr(model, "config", None) is not None:
            if any(isinstance(module, Conv1D) for module in model.modules()):
                warnings.warn(
                    "compressed-tensors cannot pack Conv1D layers (GPT-2): their merged weights lie exactly on the "
                    "grid, but are saved as dense floats.",
                    stacklevel=2,
                )
            if any(isinstance(module, MERGED) for module in model.modules()):
                describe(model, config.record())
            attach_card(model, merged_card(model, config))
        return model
