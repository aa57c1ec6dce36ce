"""Being asked before PEFT injects, saves or loads an adapter, for which it has no hooks.

Each function here puts a wrapper around one of PEFT's, which then serves adapters of every method: a LoRA on a base of
ours, or a configuration of LoRA for a file of ours, is what nobody else would see. A second call with the same function
does nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

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


def before_saving(check: Callable[[nn.Module, list[str], Any], None]) -> None:
    """Have `check(model, adapters, state_dict)` called before a PeftModel writes the first of its files, a model card.

    `adapters` are the names of those to be saved; `state_dict` has their values where they are not the model's, else it
    is None.
    """
    save = PeftModel.save_pretrained
    if getattr(save, _FIRST, None) is check:
        return

    @functools.wraps(save)
    def checked(
        self: PeftModel,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        adapters = list(self.peft_config) if selected_adapters is None else selected_adapters
        check(self, adapters, kwargs.get("state_dict"))
        save(self, save_directory, safe_serialization, selected_adapters, *args, **kwargs)

    setattr(checked, _FIRST, check)
    PeftModel.save_pretrained = checked  # type: ignore[method-assign]


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
