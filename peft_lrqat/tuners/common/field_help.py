"""The help of a configuration's fields is written once, in its docstring; `metadata["help"]` is taken from there.

What several configurations say alike is written in the docstring of a class that they share.
"""

from __future__ import annotations

import copy
import inspect
import re
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

_ENTRY = re.compile(r"^    (\w+) \((.*?)\): (.*(?:\n     .*)*)", re.MULTILINE)
#: Several fields, which another class describes.
_ELSEWHERE = re.compile(r"^    (\w+(?:, \w+)+): .*(?:\n     .*)*`(\w+)`\s+describes\s+them\.$", re.MULTILINE)


def attributes_of(cls: type) -> dict[str, tuple[str, str]]:
    """Read the section `Attributes:` of a class's docstring: name -> its type, and the text in one line.

    It is empty without docstrings (`python -OO`).
    """
    return {entry[1]: (entry[2], " ".join(entry[3].split())) for entry in _entries(cls)}


def _entries(cls: type) -> list[re.Match[str]]:
    section = re.search(r"^Attributes:\n((?: .*\n?|\n(?= ))*)", inspect.cleandoc(cls.__doc__ or ""), re.MULTILINE)
    return list(_ENTRY.finditer(section[1])) if section else []


def completed(cls: type) -> str:
    """A class's docstring with the entries of other classes in the place of `x, y: ... `Base` describes them.`"""

    def entries(found: re.Match[str]) -> str:
        base = next(base for base in cls.__mro__ if base.__name__ == found[2])
        said = {entry[1]: entry[0] for entry in _entries(base)}
        return "\n".join(said[name] for name in found[1].split(", "))

    return _ELSEWHERE.sub(entries, inspect.cleandoc(cls.__doc__ or ""))


def with_help(cls: T) -> T:
    """Decorate a dataclass: what its docstring says of a field becomes the field's `metadata["help"]`.

    Fields that it inherits are copied, so the class that they come from keeps its own help. The docstring is completed:
    descriptions that it leaves to a class that it inherits from are put into it.

    Raises:
        TypeError: the docstring describes a field that the class does not have.
    """
    if cls.__doc__:
        cls.__doc__ = completed(cls)
    fields: dict[str, Any] = cls.__dataclass_fields__  # type: ignore[attr-defined]  # it is a dataclass
    for name, (_, text) in attributes_of(cls).items():
        if name not in fields:
            raise TypeError(f"The docstring of {cls.__name__} describes {name!r}, which is none of its fields.")
        fields[name] = copy.copy(fields[name])
        fields[name].metadata = MappingProxyType({**fields[name].metadata, "help": text})
    return cls
