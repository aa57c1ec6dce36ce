"""Checks of the arguments of public functions and classes: names that there are not, flags, folders."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

C = TypeVar("C", bound=Callable[..., Any])


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option that `name` is most likely a typing error of; None: it is like none of them."""
    return next(iter(difflib.get_close_matches(name, list(options), 1)), None)


def check_folder(**given: Any) -> None:
    """Raise ValueError for what is no path, given by the names of the arguments."""
    for name, value in given.items():
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise ValueError(f"`{name}` is {value!r:.80}; it must be the path of a folder.")


def check_flags(**flags: Any) -> None:
    """Raise ValueError unless each of them, given by the name of its parameter, is True or False.

    "no" and "false" would count as True.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` is {value!r}; allowed are True, False.")


def options_of(called: Callable[..., Any]) -> list[str]:
    """The names of the parameters of a function, without `*args` and `**kwargs`."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return [one.name for one in inspect.signature(called).parameters.values() if one.kind in kinds]


def with_suggestions(called: C) -> C:
    """Decorate a class or a function without `**kwargs`: an option that it does not have is a TypeError that names the
    nearest.

    A class may have a dictionary `absent`: what is said, instead, of options that it does not have on purpose. The
    error says "got an unexpected keyword argument" as Python's does, because PEFT looks for these words when it loads a
    configuration of a later version.
    """
    init: Any = called.__init__ if isinstance(called, type) else called  # type: ignore[misc]  # the class is whole by now
    options = options_of(init)

    @functools.wraps(init)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs.keys() - options:
            near = nearest(name, options)
            hint = f"Did you mean `{near}`?" if near else f"`help({called.__name__})` describes those that there are."
            hint = getattr(called, "absent", {}).get(name, hint)
            raise TypeError(f"{called.__name__} got an unexpected keyword argument `{name}`. {hint}")
        return init(*args, **kwargs)

    if not isinstance(called, type):
        return cast(C, checked)
    called.__init__ = checked  # type: ignore[misc]
    return called
