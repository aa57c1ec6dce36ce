"""Which modules a configuration names in a model, found as PEFT will find them, before anything is changed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, _maybe_include_all_linear_layers
from torch import nn

from ...modules.kv_cache import rounding_for
from .config import ALL_LINEAR
from .experts import adopt_experts, release_experts, restore_experts
from .extras import task_heads
from .loading import loaded_layers
from .preflight import check_activations, check_base, check_cache, check_layers, check_targets
from .targets import check_names, inside_experts, inside_extras, left_out, routers


class FindsTargets(LoraModel):
    """The part of the tuner that finds modules, with a model alone too: PEFT's methods for this read nothing that
    `__init__` sets.
    """

    config_cls: Any

    @classmethod
    def _finder(cls) -> Any:
        """A tuner without a model."""
        finder = cls.__new__(cls)
        nn.Module.__init__(finder)
        return finder

    @classmethod
    def find_targets(cls, model: nn.Module, config: Any, *, loading: bool = False) -> dict[str, nn.Module]:
        """Name -> module of what `config` names in a model that is calibrated first; raises ValueError if they cannot
        be quantized.

        A projection of experts is an ExpertStack, which is not in the model.

        Args:
            loading: their weights are not there yet, and are not judged.
        """
        finder, config = cls._finder(), copy.deepcopy(config)
        adopted = adopt_experts(model, config)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # `get_peft_model` says it again
                check_names(model, config)
            release_experts(model, adopted, finder._targets(model, config, None))
            targets = finder._targets(model, config, None)
            check_base(model, config)
            if loading:
                check_layers(model, targets, config, loading=True)
            else:
                check_targets(model, targets, config)
        finally:
            restore_experts(model, adopted)
        return targets

    @classmethod
    def find_targets_to_load(cls, model: nn.Module, config: Any) -> dict[str, nn.Module]:
        """Name -> module of what `get_peft_model` will convert in a model whose weights are about to be loaded.

        A projection of experts is an ExpertStack, which is not in the model.

        Raises:
            ValueError: they cannot be quantized as `config` says.
        """
        finder, config = cls._finder(), copy.deepcopy(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # `get_peft_model` says it again
            experts = adopt_experts(model, config)
        try:
            release_experts(model, experts, finder._targets(model, config, None))
            finder._name_modules(model, config)
            targets = finder._targets(model, config, None)
            check_layers(model, targets, config, loading=True)
            finder._check_targets(targets, config)
        finally:
            restore_experts(model, experts)
        rounding_for(model, config)
        return targets

    def _name_modules(self, model: nn.Module, config: Any) -> None:
        """Replace 'all-linear' by what it means for a model, and name the heads that are trained beside it."""
        every = config.target_modules == ALL_LINEAR
        if heads := task_heads(model, config.task_type, every):
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))
        if every:
            config.target_modules = self._named_targets(model, config)

    def _targets(self, model: nn.Module, config: Any, state_dict: dict | None) -> dict[str, nn.Module]:
        """The modules that `config` names, found as PEFT will find them."""
        plan: Any = copy.copy(config)
        plan = self._prepare_adapter_config(plan, self.get_model_config(model))
        plan.target_modules = self._named_targets(model, plan)
        named = {name: module for name, module in model.named_modules() if name}
        if state_dict is not None:
            wanted = {key.rsplit("." + self.prefix, 1)[0].removeprefix("_orig_mod.") for key in state_dict}
            return {name: module for name, module in named.items() if name.removeprefix("_orig_mod.") in wanted}
        inside = tuple(name + "." for name, module in named.items() if isinstance(module, BaseTunerLayer))
        return {
            name: module
            for name, module in named.items()
            if not name.startswith(inside)
            and (found := self._check_target_module_exists(plan, name))
            and not isinstance(found, _ExcludedModule)
        }

    def _named_targets(self, model: nn.Module, config: Any) -> Any:
        """`target_modules` without 'all-linear', by which PEFT means all layers, whatever `layers_to_transform` is."""
        if config.target_modules != ALL_LINEAR:
            return config.target_modules
        plan: Any = _maybe_include_all_linear_layers(copy.copy(config), model)
        left = {*left_out(model), *inside_experts(model), *routers(model), *inside_extras(model)}
        names = (plan.target_modules - left) | loaded_layers(model).keys()
        if not names:
            check_base(model, config)  # a quantized one, whose layers have a forward of their own
            raise ValueError(
                "`target_modules` is 'all-linear', but the model has no nn.Linear or Conv1D, or its output layer only."
            )
        if plan.layers_to_transform is None:
            return names
        plan.target_modules = {name.rpartition(".")[2] for name in names}  # by whole names PEFT does not ask for layers
        found = {name for name in names if "." in name and self._check_target_module_exists(plan, name)}
        if not found:
            raise ValueError(
                f"`layers_to_transform` is {plan.layers_to_transform!r}, but no linear layer of the model is in such a "
                "layer. Count from 0; `layers_pattern` names the list of layers."
            )
        return found

    def _check_targets(self, targets: dict[str, nn.Module], config: Any) -> None:
        """Raise ValueError if a targeted module cannot be converted as `config` says; subclasses add to it."""
        check_activations(targets, config)
        check_cache(targets, config)
