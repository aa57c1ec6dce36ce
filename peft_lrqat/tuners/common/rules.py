"""What the fields of a configuration may hold: one table of rules for each method, and who applies it.

A value is first made a plain Python value, so that what passes here can be written to adapter_config.json: numpy's
numbers become Python's, tuples and ranges lists.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from ...grid import SCALE_DTYPES
from ...ops.kv_cache import CACHE_BITS, CACHE_RULES


class Rule(NamedTuple):
    """What a field may hold."""

    says: str  # ends the error "`field` is ...; {says}."
    allows: Callable[[Any], bool]
    entries: Rule | None = None  # of a field that is a dictionary: what its values may be


def check_fields(config: Any, rules: Mapping[str, Rule]) -> None:
    """Make the fields of a configuration plain Python values, and raise ValueError unless each obeys its rule.

    Args:
        config: a dataclass.
        rules: by the names of fields. Those of fields that `config` does not have are skipped (versions of PEFT differ
            in them).
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        made = plain(value)
        if made is not value:
            setattr(config, field.name, made)
    for name, rule in rules.items():
        if hasattr(config, name):
            check_value(name, getattr(config, name), rule)


def check_value(name: str, value: Any, rule: Rule) -> None:
    """Raise ValueError unless `value`, of the field `name`, obeys the rule."""
    if not rule.allows(value):
        found = repr(value)
        if len(found) > 1000:  # a model, a data set
            found = f"of type {type(value).__name__}"
        raise ValueError(f"`{name}` is {found}; {rule.says}.")
    if rule.entries is not None and isinstance(value, dict):
        for key, entry in value.items():
            check_value(f"{name}[{key!r}]", entry, rule.entries)


def plain(value: Any) -> Any:
    """The Python value that JSON writes for this one: the same object where nothing has to change."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (tuple, range, np.ndarray)):
        return [plain(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list):
        made = [plain(entry) for entry in value]
        return made if any(new is not old for new, old in zip(made, value, strict=True)) else value
    if isinstance(value, (set, frozenset)):
        if all(isinstance(entry, str) for entry in value):  # names stay a set, as PEFT has them
            return set(value) if isinstance(value, frozenset) else value
        made = [plain(entry) for entry in value]
        return sorted(made) if all(map(is_index, made)) else made
    if isinstance(value, dict):
        pairs = {plain(key): plain(entry) for key, entry in value.items()}
        same = all(new is value.get(key) for key, new in pairs.items())
        return value if same else pairs
    return value


# -- what values are


def is_index(value: Any) -> bool:
    """Whether a value is an integer from 0; a bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def are_indices(values: Any) -> bool:
    """Whether values are a list of such integers."""
    return isinstance(values, list) and all(map(is_index, values))


def is_positive(value: Any) -> bool:
    """Whether a value is a number above 0, and finite; a bool is not."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_names(values: Any) -> bool:
    return isinstance(values, (list, set)) and all(map(_is_name, values))


def _is_regex(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True


def _selects(value: Any) -> bool:
    return _are_names(value) or (_is_name(value) and _is_regex(value))


# -- rules


def one_of(*allowed: Any) -> Rule:
    """One of these values, of its own type (1 is not True, and 8.0 is not 8)."""
    shown = ", ".join(repr(a) for a in allowed)
    return Rule(f"allowed are {shown}", lambda value: any(type(value) is type(a) and value == a for a in allowed))


def optional(rule: Rule) -> Rule:
    """What another rule allows, or None."""
    return Rule(f"{rule.says}, or None", lambda value: value is None or rule.allows(value), rule.entries)


FLAG = one_of(True, False)
NUMBER = Rule(
    "it must be a finite number",
    lambda value: isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value),
)
NOT_NEGATIVE = Rule(
    "it must be a number of 0 or more, and finite", lambda value: NUMBER.allows(value) and float(value) >= 0
)
POSITIVE = Rule("it must be a positive number, and finite", is_positive)
INTEGER = Rule("it must be an integer", lambda value: isinstance(value, Integral) and not isinstance(value, bool))
WHOLE = Rule("it must be an integer, 1 or more", lambda value: is_index(value) and value > 0)
RANK = Rule("a rank must be an integer, 0 or more (0: only the scales are trained)", is_index)
TEXT = Rule("it must be a string", lambda value: isinstance(value, str))
MODULES = Rule(
    "it must be 'all-linear', a list of names of modules, or a regular expression for their whole names",
    lambda value: _selects(value) and bool(value),
)
LEFT_OUT = Rule("it must be a list of names of modules, or a regular expression for their whole names", _selects)


def pattern(entries: Rule) -> Rule:
    """A dictionary from regular expressions of names to values."""
    return Rule(
        "it must be a dictionary from patterns of names, which are regular expressions, to values",
        lambda value: isinstance(value, dict) and all(isinstance(key, str) and _is_regex(key) for key in value),
        entries,
    )


def _are_tokens(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_name(name) and are_indices(rows) for name, rows in value.items())
    return are_indices(value)


#: What transformers' configurations allow as `problem_type`.
_PROBLEMS = (None, "regression", "single_label_classification", "multi_label_classification")


def _is_head(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("problem_type") not in _PROBLEMS:
        return False
    labels = value.get("labels")  # transformers takes numbers, too, and lets names be empty
    return isinstance(labels, list) and bool(labels) and all(isinstance(label, (str, int)) for label in labels)


#: In `act_bits_pattern`, the same as None: floats.
FLOAT_BITS = 16

#: The fields that both methods have.
SHARED: dict[str, Rule] = {
    "target_modules": MODULES,
    "exclude_modules": optional(LEFT_OUT),
    "layers_to_transform": optional(
        Rule("it must be an index, or a list of indices", lambda value: is_index(value) or are_indices(value))
    ),
    "layers_pattern": optional(Rule("it must be a name or a list of names", lambda v: _is_name(v) or _are_names(v))),
    "modules_to_save": optional(Rule("it must be a list of module names", _are_names)),
    "trainable_token_indices": optional(
        Rule(
            "it must be a list of token indices (0 or more), or a dictionary from names of embeddings to such lists",
            _are_tokens,
        )
    ),
    "range_p": Rule("it must be a positive number such as 2.4 or 4", is_positive),
    "learn_scales": FLAG,
    "scale_dtype": one_of(*SCALE_DTYPES),
    "act_bits": one_of(None, 8, 4),
    "act_group_size": optional(Rule("it must be a positive integer", lambda value: is_index(value) and value > 0)),
    "act_bits_pattern": optional(pattern(one_of(None, FLOAT_BITS, 8, 4))),
    "act_rule": one_of("transformers", "vllm"),
    "kv_bits": one_of(None, *CACHE_BITS),
    "kv_rule": one_of(*CACHE_RULES),
    "act_scale": one_of("dynamic", "static"),
    "inference_mode": FLAG,
    "auto_mapping": optional(Rule("it must be a dictionary", lambda value: isinstance(value, dict))),
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version"), optional(TEXT)),
    "base_dtype": one_of(None, "float32", "bfloat16", "float16"),
    "base_head": optional(
        Rule(
            "it must be a dictionary with the list of names `labels`, and a `problem_type` of transformers or None",
            _is_head,
        )
    ),
    **dict.fromkeys(("base_fingerprint", "base_checksum"), optional(TEXT)),
    "trainings": optional(
        Rule(
            "it must be a list of dictionaries of texts",
            lambda value: (
                isinstance(value, list)
                and all(isinstance(entry, dict) and all(isinstance(v, str) for v in entry.values()) for entry in value)
            ),
        )
    ),
}
