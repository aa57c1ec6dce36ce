"""The help of a configuration's fields is written once, in its docstring; `metadata["help"]` is taken from there."""

from __future__ import annotations

import copy
import inspect
import re
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

_ENTRY = re.compile(r"^    (\w+) \((.*?)\): (.*(?:\n     .*)*)", re.MULTILINE)


def attributes_of(cls: type) -> dict[str, tuple[str, str]]:
    """Read the section `Attributes:` of a class's docstring: name -> its type, and the text in one line.

    It is empty without docstrings (`python -OO`).
    """
    section = re.search(r"^Attributes:\n((?: .*\n?|\n(?= ))*)", inspect.cleandoc(cls.__doc__ or ""), re.MULTILINE)
    found = _ENTRY.findall(section[1]) if section else []
    return {name: (kind, " ".join(text.split())) for name, kind, text in found}


def with_help(cls: T) -> T:
    """Decorate a dataclass: what its docstring says of a field becomes the field's `metadata["help"]`.

    Fields that it inherits are copied, so the class that they come from keeps its own help.

    Raises:
        TypeError: the docstring describes a field that the class does not have.
    """
    fields: dict[str, Any] = cls.__dataclass_fields__  # type: ignore[attr-defined]  # it is a dataclass
    for name, (_, text) in attributes_of(cls).items():
        if name not in fields:
            raise TypeError(f"The docstring of {cls.__name__} describes {name!r}, which is none of its fields.")
        fields[name] = copy.copy(fields[name])
        fields[name].metadata = MappingProxyType({**fields[name].metadata, "help": text})
    return cls
