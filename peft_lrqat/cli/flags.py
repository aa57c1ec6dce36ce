"""Messages of the Python functions, as somebody reads them who typed a command: flags instead of arguments."""

from __future__ import annotations

import re

# Python's name -> the flag. Those of one word are words of English too, so they count only in code: `name`, name=value.
_FLAGS = {
    name: "--" + name.replace("_", "-")
    for name in ("against", "allow_inexact", "container_bits", "engine", "format", "max_shard_size", "overwrite",
                 "tokenizer", "trust_remote_code")
}  # fmt: skip
_OWN = ("checkpoint_format", "embedding_type", "tokenizer_pre", "type", "vocabulary")  # of the formats: -o NAME=VALUE
_NAMES = "|".join([*_FLAGS, *_OWN])
_GIVEN = re.compile(rf"""(`?)(?<![\w.(])({_NAMES})=('[^']*'|"[^"]*"|[\w.+-]*\w)\1(?!\w)""")
_QUOTED = re.compile(rf"`({_NAMES})=?`")
_BARE = re.compile(rf"(?<![\w.`/-])({'|'.join(name for name in _FLAGS if '_' in name)})(?![\w=/]|\.\w)")


def flags(text: str) -> str:
    """`text` with `overwrite=True` as --overwrite, container_bits=4 as --container-bits 4, type='q4_k' as -o type=q4_k,
    and what these are called alone likewise."""
    text = _GIVEN.sub(lambda found: _given(found[2], found[3].strip("'\"")), text)
    text = _QUOTED.sub(lambda found: f"`{_name(found[1])}`", text)
    return _BARE.sub(lambda found: _name(found[1]), text)


def _name(name: str) -> str:
    return _FLAGS.get(name) or f"-o {name}"


def _given(name: str, value: str) -> str:
    if name in _OWN:
        return f"-o {name}={value.lower() if value in ('True', 'False') else value}"
    flag = _FLAGS[name]
    return {"True": flag, "False": flag.replace("--", "--no-", 1), "None": f"no {flag}"}.get(value, f"{flag} {value}")
