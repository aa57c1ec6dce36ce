"""Registering tuner types with PEFT from outside, and being asked before it injects, saves or loads an adapter.

PEFT's `register_peft_method` accepts only names that are members of its `PeftType` enum, and offers no way to add one.
A new member is made the way `enum` itself makes them; afterwards `PeftType("LRQAT")`, `PeftType.LRQAT`, pickling and
JSON behave as for PEFT's own methods. Everything here is idempotent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import nn


def ensure_peft_type(name: str) -> PeftType:
    """The `PeftType` member of that (upper-case) name, added to the enum if it is missing."""
    if name in PeftType.__members__:
        return PeftType.__members__[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]  # enum's own, untyped
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.13
        PeftType._hashable_values_.append(name)  # type: ignore[attr-defined]
    return member


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner], prefix: str) -> None:
    """Register a tuner type with PEFT; a second call does nothing.

    Raises:
        RuntimeError: another package has registered the same name.
    """
    member = ensure_peft_type(name.upper())
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=prefix)
    elif known.__qualname__ != config_cls.__qualname__ or known.__module__ != config_cls.__module__:
        raise RuntimeError(
            f"The PEFT method {name!r} is already registered by {known.__module__}. Import only one of the two "
            "packages."
        )


def before_injection(prepare: Callable[[nn.Module], None]) -> None:
    """Have `prepare(model)` called before PEFT injects an adapter of any method; a second call with it does nothing."""
    inject = BaseTuner.inject_adapter
    if getattr(inject, "prepare", None) is prepare:
        return

    @functools.wraps(inject)
    def prepared(self: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        prepare(model)
        inject(self, model, *args, **kwargs)

    prepared.prepare = prepare  # type: ignore[attr-defined]  # how the second call knows
    BaseTuner.inject_adapter = prepared  # type: ignore[method-assign]  # PEFT offers no hook for this


def before_saving(check: Callable[[nn.Module, list[str], Any], None]) -> None:
    """Have `check(model, adapters, state_dict)` called before a PeftModel writes the first of its files; a second call
    with it does nothing.
    """
    save = PeftModel.save_pretrained
    if getattr(save, "check", None) is check:
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

    checked.check = check  # type: ignore[attr-defined]  # how the second call knows
    PeftModel.save_pretrained = checked  # type: ignore[method-assign]  # PEFT offers no hook before its model card


def before_loading(check: Callable[[Any, dict[str, Any]], None]) -> None:
    """Have `check(config, state_dict)` called before PEFT loads tensors into an adapter of any method; a second call
    with it does nothing.
    """
    remap = BaseTuner._remap_adapter_state_dict_for_load.__func__  # type: ignore[attr-defined]  # of a classmethod
    if getattr(remap, "check", None) is check:
        return

    @functools.wraps(remap)
    def checked(cls: type, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]) -> Any:
        check(config, state_dict)
        return remap(cls, model, config, adapter_name, state_dict)

    checked.check = check  # type: ignore[attr-defined]  # how the second call knows
    BaseTuner._remap_adapter_state_dict_for_load = classmethod(checked)  # type: ignore[assignment,method-assign]
