"""Registering tuner types with PEFT from outside.

PEFT's `register_peft_method` accepts only names that are members of its `PeftType` enum, and offers no way to add one.
A new member is made the way `enum` itself makes them; afterwards `PeftType("LRQAT")`, `PeftType.LRQAT`, pickling and
JSON behave as for PEFT's own methods. Everything here is idempotent.
"""

from __future__ import annotations

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method


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
