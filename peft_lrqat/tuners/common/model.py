"""What the tuners of this package share: checks before anything is changed, packed state dicts, and the checkpoint."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...checkpoint.card import attach_card, merged_card, merged_serving
from ...formats.record import Record
from ...modules.kv_cache import keep_floats, round_cache, rounding_for, settle
from ...modules.packed import MERGED, QuantizedLinear, describe
from ...modules.trained_vectors import ReadAsServed, TrainedVectors, settle_vectors, train_in_fp32
from .adapter_file import (
    CHECKSUM,
    PREFIX,
    adapters_of,
    check_adapter_file,
    check_same_base,
    check_shapes,
    check_state_dict,
    layers_to_save,
    layers_with,
    note_changed_base,
    note_sharded_base,
)
from .async_rollouts import teach_async_trainers
from .coarse import watch
from .config import ALL_LINEAR, current_key
from .experts import adopt_experts, release_experts, settle_experts
from .extras import (
    adopt_labels,
    check_extras,
    check_merged_extras,
    check_reference,
    head_of,
    restore_extras,
    round_extras,
    trained_beside,
    warn_of_converted_head,
    warn_of_layers_of_others,
    warn_of_unnamed_base,
    warn_of_unsaved,
)
from .finding import FindsTargets
from .fingerprint import as_tensor, check_checksum, check_fingerprint, dtype_of, fingerprint, in_order, version_of
from .frozen import FrozenWeight
from .input_scale import know_neighbours
from .layer import MergingLayer, merging, parameters_become_meta
from .loading import adopt_loaded
from .loss import restore_loss, use_lean_loss
from .offload import arrange, check_offload_announced, check_offload_sharded, offloaded_parameters
from .packed_parameter import packed_state_dict
from .parallel import announced_fsdp, check_announced, check_loaded, check_sharded, has_peers
from .preflight import (
    check_adapter_name,
    check_base,
    check_model,
    check_targets,
    check_writable,
)
from .progress import conversion_bar
from .runs import Run, note_trainings, remember_run, trainings_of
from .scale_range import warn_of_lost_scales
from .summary import report, say_how_to_serve
from .targets import check_names, tell_left_out
from .trainers import check_trained
from .undo import Undo
from .unfilled import check_filled, warn_of_no_values
from .walking import QuickWalks


class _Conversion(NamedTuple):
    """What is at hand while layers are converted."""

    undo: Undo
    checksums: dict[str, int]  # of the weights, by the modules' names
    bar: Any  # counts the layers


class QuantizingModel(QuickWalks, FindsTargets):
    """PEFT's LoRA tuner with another kind of layer, over a base that is converted to a grid.

    An error leaves the model, the configuration and the other adapters as they were. Where memory is short, conversion
    goes layer by layer instead, and needs the memory of one layer above the loaded model (`undo.py`).

    Attributes:
        config_cls: the configuration that the tuner takes.
        shared_options: its fields in which all adapters of a model must agree, because they share a converted base.
        frozen_experts: the base of a projection of experts; None: experts stay float.
        trains_integers: whether the trained parameters are integers, which fewer ways of sharding suit.
        runs: what Trainers have done to the model, in order.
        unfilled: whether an adapter was made without values, and nobody has looked whether it has got them.
    """

    config_cls: Any
    shared_options: tuple[str, ...]
    frozen_experts: type[FrozenWeight] | None = None
    trains_integers = False
    runs: list[Run]
    unfilled = False
    _base_was_sharded = False
    peft_config: dict[str, Any]  # PEFT's annotation, PeftConfig, does not know our fields
    _conversion: _Conversion | None = None  # while layers are converted

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        check_model(model)
        # PEFT, or transformers' add_adapter, writes these two before an adapter is looked at
        known: Any = getattr(model, "peft_config", None)  # of a PeftModel too, which may be wrapped again
        adapters = dict(known) if isinstance(known, dict) else None
        vars(self)["runs"] = []  # PEFT's __init__ calls the tuner's methods before torch's
        try:
            super().__init__(model, *args, **kwargs)
        except BaseException:
            if adapters is None:
                vars(model).pop("_hf_peft_config_loaded", None)
            else:
                known.clear()
                known.update(adapters)
            raise

    # -- before anything is changed, and the way back

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's `inject_adapter`, after every targeted module has been looked at.

        Raises:
            ValueError: the model or one of its targeted modules cannot be quantized as asked. Nothing was changed then.
            RuntimeError: another error came when there was no room to keep what had been converted already.
        """
        # PEFT and the conversion write to the configuration, and its owner may use it for further models
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        undo: Undo | None = None
        try:
            undo = Undo([*self.modules(), getattr(model, "config", None)])
            self._inject(model, adapter_name, undo, *args, **kwargs)
        except BaseException as error:
            restored = undo is None or undo.restore()
            vars(self).pop("_conversion", None)
            self.peft_config.pop(adapter_name, None)  # PEFT registers the adapter before it injects it
            if undo is None or restored:
                raise
            if not isinstance(error, Exception):  # somebody interrupts, and shall not be taken for an error
                error.add_note(undo.explain())
                raise
            raise RuntimeError(undo.explain()) from error
        undo.done()

    def _inject(self, model: nn.Module, adapter_name: str, undo: Undo, *args: Any, **kwargs: Any) -> None:
        config, state_dict = self.peft_config[adapter_name], kwargs.get("state_dict")
        check_adapter_name(adapter_name, model)
        config.check_fields()
        check_loaded(model)
        if not config.inference_mode:
            check_announced(trains_integers=self.trains_integers)
            if config.offload_base:
                check_offload_announced()
        experts = adopt_experts(model, config)
        kept = bool(experts) and release_experts(model, experts, self._targets(model, config, state_dict))
        del experts  # with the parameters that transformers has them in
        adopted = self._adopt_base(model, config, state_dict) or kept
        adopt_loaded(model, self._targets(model, config, state_dict), config)
        cache = rounding_for(model, config)
        self._check_new_adapter_config(config)
        config.check_options()  # attributes may have been set since the configuration was made
        # `get_peft_model` makes the whole tuner in PEFT's context, and does not say so
        without_values = kwargs.get("low_cpu_mem_usage") or parameters_become_meta()
        if without_values:
            warn_of_no_values(adapter_name, config)
        check_names(model, config)
        every = config.target_modules == ALL_LINEAR
        self._name_modules(model, config)
        targets = self._targets(model, config, state_dict)
        if every:
            tell_left_out(model)
            warn_of_converted_head(model, targets, config)
        for module in targets.values():  # where PEFT's dictionary has forgotten an adapter of the same name
            self._check_shared(config, adapters_of(module))
        checksums = self._check(model, targets, config)
        config.base_fingerprint = fingerprint(targets, checksums)
        config.base_dtype = dtype_of(targets)
        check_fingerprint(config.base_fingerprint, config._required_fingerprint, config._required_dtype)
        check_adapter_file(targets, config)
        check_extras(model, targets, config)
        check_reference(adapter_name, config, self.peft_config)
        adopt_labels(model, config)
        converts = not all(isinstance(module, MergingLayer) for module in targets.values())
        undo.keep([m for m in targets.values() if not isinstance(m, FrozenWeight)], config.bytes_per_weight)
        if adopted and not undo.keeps:
            undo.retake(self.modules())  # adoption changes no number, and what it replaced takes memory
        known = layers_with(adapter_name, model)  # PEFT lets a name be used again, and warns
        converted = sum(not isinstance(module, MergingLayer | FrozenWeight) for module in targets.values())
        with conversion_bar(converted, config.method) as bar:
            self._conversion = _Conversion(undo, checksums, bar)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            del self._conversion
        self.unfilled |= bool(without_values)
        if other := (layers_with(adapter_name, model) ^ targets.keys()) - known:
            raise RuntimeError(
                f"PEFT adapted other modules than were checked before ({sorted(other)[:3]} ...). "
                "This version of PEFT chooses them otherwise than the versions that this package knows: please "
                "report it, with your configuration."
            )
        self._check_converted(targets, config)
        know_neighbours({name: model.get_submodule(name) for name in targets}, adapter_name)
        arrange(model, config.offload_base)
        for name, module in trained_beside(model, adapter_name).items():
            watch(name, module)
        if cache is not None:
            round_cache(model, cache)
        use_lean_loss(model)
        teach_async_trainers()
        if converts:
            report(model, config)

    def _adopt_base(self, model: nn.Module, config: Any, state_dict: dict | None) -> bool:
        """For subclasses: make a base that others quantized into one of this package. Returns whether it was."""
        return False

    def _check(self, model: nn.Module, targets: dict[str, nn.Module], config: Any) -> dict[str, int]:
        """Name -> checksum of the weight, for modules that can all be converted as `config` says; or ValueError."""
        check_base(model, config)
        check_writable(model, targets, config.method)
        checksums = check_targets(model, targets, config)
        self._check_targets(targets, config)
        for name in targets:
            self._check_target_module_compatiblity(config, model, name.rpartition(".")[2])
        return checksums

    def _check_converted(self, targets: dict[str, nn.Module], config: Any) -> None:
        """Note which integers the base became; raises ValueError if the adapter was trained over others."""
        model: nn.Module = self.model
        layers: list[Any] = [model.get_submodule(name) for name in targets]
        config.base_checksum = in_order(int(layer.frozen.checksum()) for layer in layers)
        config._converted = len(layers)
        if (required := config._required_checksum) is not None:
            version = version_of(required)
            check_checksum(in_order((int(layer.frozen.checksum(version)) for layer in layers), version), required)

    def _source_checksum(self, name: str) -> int | None:
        """The checksum of the weight that is being converted, where it is known."""
        return None if self._conversion is None else self._conversion.checksums.get(name)

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if not isinstance(config, self.config_cls):
            raise ValueError(f"{type(self).__name__} needs a {self.config_cls.__name__}, got {type(config).__name__}.")
        self._check_shared(config, self.peft_config)

    def _check_shared(self, config: Any, others: dict[str, Any]) -> None:
        """Raise ValueError if a new adapter's `shared_options` are not those of the others (name -> configuration)."""
        for name, other in others.items():
            if other is config or not isinstance(other, self.config_cls):
                continue
            for option in self.shared_options:
                new, old = getattr(config, option), getattr(other, option)
                if new != old:
                    raise ValueError(
                        f"All adapters of a model share its converted base, but the new adapter has {option}={new!r} "
                        f"and adapter {name!r} has {option}={old!r}. Make it with that, or load it on a fresh "
                        "copy of the float model."
                    )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        packed = isinstance(child, QuantizedLinear)
        if packed:  # PEFT asks the first of `qweight` and `weight` for its device, and `weight` would be built for that
            child.qweight = child.weight_packed
        if isinstance(child, FrozenWeight):
            child.qweight = child.scale0_bits.new_empty(0, device=child.device)
        super()._replace_module(parent, child_name, new_module, child)
        if packed or isinstance(child, FrozenWeight):
            del child.qweight
        if isinstance(new_module, MergingLayer):
            new_module.take_from(child)
        if self._conversion is not None and not isinstance(child, FrozenWeight):
            self._conversion.undo.replaced(child)
            self._conversion.bar.update()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's, which takes an adapter's half-precision parameters to fp32; and norms that are trained beside it."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for name, module in trained_beside(self, adapter_name).items() if autocast_adapter_dtype else ():
            train_in_fp32(module)
            if isinstance(module, TrainedVectors):
                self.get_submodule(name).__class__ = ReadAsServed

    def train(self, mode: bool = True) -> QuantizingModel:
        """Set the mode as torch's `train` does. Before an evaluation (False) it warns if scales have left their range.

        A Trainer calls it before each step and each evaluation: what it logs is for the model cards.

        Raises:
            ValueError: `mode` is True, and a Trainer would train nothing of the model, or what it would train has no
                values, or the model is sharded so that other integers would be trained than merged; or a base that is
                offloaded is sharded.
        """
        check_offload_sharded(self)
        if mode:
            self._check_filled()
            check_trained(self)
            check_sharded(self, self.prefix)
        elif self.training:
            warn_of_lost_scales(self)
        remember_run(self)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's; ValueError if an adapter that it trains has no values."""
        self._check_filled()
        if self.training and not self._base_was_sharded and has_peers() and announced_fsdp() is not None:
            self._base_was_sharded = note_sharded_base(self, self.peft_config)
        return super().forward(*args, **kwargs)

    def _check_filled(self) -> None:
        if self.unfilled:
            check_filled(self)
            self.unfilled = False

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP shall leave where it is: of the PeftModel around this, which it asks."""
        return [f"base_model.{name}" for name in offloaded_parameters(self)]

    # -- state dicts

    def state_dict(self, *args: Any, **kwargs: Any):
        """Return the tensors as they are stored, with packed bases.

        (`model.base_model.model.state_dict()` gives float weights, as PEFT expects it.)
        """
        with packed_state_dict():
            return super().state_dict(*args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        warn_of_lost_scales(model, adapter_name)
        warn_of_unsaved(model, config)
        warn_of_layers_of_others(model, adapter_name)
        warn_of_unnamed_base(model, config)
        runs = next((tuner.runs for tuner in model.modules() if isinstance(tuner, QuantizingModel)), [])
        config.base_head = head_of(model, config)
        adapted = layers_to_save(adapter_name, model)
        if dtype_of(adapted) == "float32":  # perhaps since `model.float()`; it holds the values of every base
            config.base_dtype = "float32"
        config._saved_as = adapter_name
        note_trainings(config, runs, adapter_name)
        note_changed_base(model, {adapter_name: config, **getattr(model, "peft_config", {})})
        found = cls._adapter_tensors(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.base_checksum is not None and any(not value.is_meta for value in found.values()):
            # beside the one in the configuration, which nobody reads who loads into an adapter that exists (Trainer)
            prefix = PREFIX if any(key.startswith(PREFIX) for key in found) else ""
            found[prefix + cls.prefix + CHECKSUM] = as_tensor(config.base_checksum)
        return found

    @classmethod
    def _adapter_tensors(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        """What PEFT saves of an adapter."""
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        state_dict = {current_key(key): value for key, value in state_dict.items()}
        with packed_state_dict():
            remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        round_extras(model, adapter_name, remapped)
        saved = {key: remapped.pop(key) for key in list(remapped) if cls.prefix + CHECKSUM in key.split(".")}
        for name, layer in model.named_modules():
            if isinstance(layer, MergingLayer):
                check_shapes(dict(layer.named_parameters(prefix=name)), remapped)
        check_state_dict(model, config, adapter_name, cls.prefix, remapped, whole=bool(saved))
        cls._check_loaded(model, config, adapter_name, remapped)
        config._earlier_trainings = config._noted_trainings
        if saved:
            check_same_base(model, config, adapter_name, saved, cls.prefix + CHECKSUM)
        return remapped

    @classmethod
    def _check_loaded(cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]) -> None:
        """For subclasses: raise ValueError if tensors of an adapter's file cannot be those of the model's layers."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: rounding is not additive."""
        return False

    # -- the checkpoint

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge as PEFT's `merge_adapter` does, in all layers or in none.

        A layer that has none of the adapters is merged as well, because its base is part of what is served.

        Args:
            adapter_names (list[str] | None): which adapters. None: the active ones.
            safe_merge (bool): refuse adapters that are not finite.

        Raises:
            ValueError: there is no such adapter, or a layer cannot be merged.
        """
        options = self._merge_options(adapter_names)
        unmerged = [module for module in self.modules() if isinstance(module, MergingLayer) and not module.merged]
        try:
            with merging(options):
                super().merge_adapter(adapter_names, safe_merge)
        except BaseException:
            for layer in unmerged:
                if layer.merged:
                    layer.unmerge()
            raise

    def record(self, adapters: list[str]) -> Record:
        """What a checkpoint says of the training of these adapters, which are merged."""
        earlier = [training for name in adapters for training in self.peft_config[name]._earlier_trainings]
        made = self.peft_config[adapters[0]].record()
        return replace(made, trainings=(*earlier, *trainings_of(self.runs, adapters)))

    def _merge_options(self, adapter_names: list[str] | None) -> Any:
        """The configuration of the first adapter that is merged (None: of the active ones)."""
        if isinstance(adapter_names, str):
            raise ValueError(f"`adapter_names` is {adapter_names!r}; it must be a list of names: [{adapter_names!r}].")
        if not self.peft_config:
            raise ValueError("There is no adapter left to merge. Call `unload()` for the base at step 0.")
        if unknown := [name for name in adapter_names or () if name not in self.peft_config]:
            raise ValueError(f"There is no adapter {unknown[0]!r} to merge; the model has {sorted(self.peft_config)}.")
        if adapter_names:
            merged = {
                name for layer in self.modules() if isinstance(layer, MergingLayer) for name in layer.merged_adapters
            }
            check_merged_extras(self, merged.union(adapter_names))
        return self.peft_config[(adapter_names or self.active_adapters or list(self.peft_config))[0]]

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT annotates None, but returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        config: Any = None
        if merge:
            config = self._merge_options(adapter_names)
            record = self.record(list(adapter_names or self.active_adapters) or list(self.peft_config))
        with merging(config):
            if merge:  # before the first layer is replaced, because what was trained goes with it
                for layer in (module for module in self.modules() if isinstance(module, MergingLayer)):
                    layer.check_merge(adapter_names, safe_merge)
            else:
                restore_extras(self)
            model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        settle_vectors(model)
        settle_experts(model)
        restore_loss(model)
        if merge:
            settle(model)
        else:
            keep_floats(model)
        if merge and getattr(model, "config", None) is not None:
            if any(isinstance(module, Conv1D) for module in model.modules()):
                warnings.warn(
                    "compressed-tensors cannot pack Conv1D layers (GPT-2): their merged weights lie exactly on the "
                    "grid, but are saved as dense floats.",
                    stacklevel=2,
                )
            packed = any(isinstance(module, MERGED) for module in model.modules())
            problem = describe(model, record) if packed else ""
            served = merged_serving(model, config.export_format, problem)
            attach_card(model, merged_card(model, config, record, served))
            say_how_to_serve(config, served)
        return model
