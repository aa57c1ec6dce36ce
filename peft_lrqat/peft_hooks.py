"""Being asked before PEFT injects, saves or loads an adapter, or transformers saves a model, for which they have no
hooks.

Each function here puts a wrapper around one of theirs, which then serves adapters of every method: a LoRA on a base of
ours, or a configuration of LoRA for a file of ours, is what nobody else would see. A second call with the same function
does nothing.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

# attribute of a wrapper: what it calls first
_FIRST = "_peft_lrqat_first"


def before_injection(prepare: Callable[[nn.Module], None]) -> None:
    """Have `prepare(model)` called before PEFT injects an adapter into a model."""
    inject = BaseTuner.inject_adapter
    if getattr(inject, _FIRST, None) is prepare:
        return

    @functools.wraps(inject)
    def prepared(self: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        prepare(model)
        inject(self, model, *args, **kwargs)

    setattr(prepared, _FIRST, prepare)
    BaseTuner.inject_adapter = prepared  # type: ignore[method-assign]


def before_saving(check: Callable[[nn.Module, list[str], dict[str, Any]], None]) -> None:
    """Have `check(model, adapters, options)` called before a PeftModel writes the first of its files, a model card.

    `adapters` are the names of those to be saved; `options` are those of `save_pretrained` that were given, by name.
    """

    def ask(model: Any, options: dict[str, Any]) -> None:
        adapters = options.get("selected_adapters")
        check(model, list(model.peft_config) if adapters is None else adapters, options)

    _before_save_pretrained(PeftModel, check, ask)


def before_saving_a_model(look: Callable[[nn.Module, dict[str, Any]], None]) -> None:
    """Have `look(model, options)` called before transformers saves a model, or the adapter that it manages itself.

    `options` are those of `save_pretrained` that were given, by name.
    """
    _before_save_pretrained(PreTrainedModel, look, look)


def _before_save_pretrained(owner: Any, first: Callable[..., None], ask: Callable[[Any, dict[str, Any]], None]) -> None:
    """Have `ask(model, options)` called before `owner.save_pretrained`, by whose mark `first` is known to be there."""
    save = owner.save_pretrained
    if getattr(save, _FIRST, None) is first:
        return

    @functools.wraps(save)
    def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
        options = _options(save, self, args, kwargs)
        if options is not None:
            ask(self, options)
        return save(self, *args, **kwargs)

    setattr(asked, _FIRST, first)
    owner.save_pretrained = asked


def _options(method: Callable[..., Any], self: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call by name; None: they are not what the method takes, which says so itself."""
    try:
        options = dict(inspect.signature(method).bind(self, *args, **kwargs).arguments)
    except TypeError:
        return None
    return options | options.pop("kwargs", {})


def before_loading(check: Callable[[Any, dict[str, Any]], None]) -> None:
    """Have `check(config, state_dict)` called before PEFT loads tensors into an adapter.

    `state_dict` has them by name, before the tuner gives them those of the model.
    """
    remap = BaseTuner._remap_adapter_state_dict_for_load.__func__  # type: ignore[attr-defined]  # of a classmethod
    if getattr(remap, _FIRST, None) is check:
        return

    @functools.wraps(remap)
    def checked(cls: type, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]) -> Any:
        check(config, state_dict)
        return remap(cls, model, config, adapter_name, state_dict)

    setattr(checked, _FIRST, check)
    BaseTuner._remap_adapter_state_dict_for_load = classmethod(checked)  # type: ignore[assignment,method-assign]


def before_loading_a_file(look: Callable[[PeftModel, str, str], None]) -> None:
    """Have `look(model, folder, adapter)` called before a PeftModel loads a folder, or what the Hub has under that
    name, into the adapter.
    """
    load = PeftModel.load_adapter
    if getattr(load, _FIRST, None) is look:
        return

    @functools.wraps(load)
    def looked(self: PeftModel, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        inside = kwargs.get("subfolder")
        look(self, os.path.join(model_id, inside) if inside else str(model_id), adapter_name)
        return load(self, model_id, adapter_name, *args, **kwargs)

    setattr(looked, _FIRST, look)
    PeftModel.load_adapter = looked  # type: ignore[method-assign,assignment]  # its arguments are handed on
