"""Files that a stranger wrote or a disk damaged: whatever a library raises over them becomes a sentence that names
them.

Headers and JSON are checked where they are read (`files.py`, `formats/shards.py`, `formats/gguf/reader.py`). What they
say then reaches transformers and torch, which raise whatever they raise, or build what a number asks for.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Entries of config.json that say how often something is built in Python (for sizes, nothing is allocated), and how
# often it may be, whatever the files hold. Names of labels are anything, so their tables are left out.
_COUNT = re.compile(r"layer|expert|block|depth|stage|head|codebook|group")
_NO_COUNT = re.compile(r"size|_ids?$|dim|rank|window|length|token|scale|offset|pos")
_LABELS = ("label2id", "id2label")
_ALWAYS, _MOST_LABELS = 4096, 10**6


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever is raised within becomes a ValueError that names `path`.

    Errors of the system (a file that is missing, or may not be read) and of missing packages stay as they are.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(_said(error, path)) from error


def _said(error: Exception, path: Path) -> str:
    said = str(error)
    if isinstance(error, pickle.UnpicklingError):
        said = "it holds a pickle, which can run code, and not only tensors. Have it saved as safetensors"
    elif not isinstance(error, ValueError | OSError):
        said = f"it is damaged, or of a kind that the libraries here cannot read ({type(error).__name__}: {said})"
    elif f"'{path}" in said or said.startswith(f"{path.name}: "):
        return said
    return f"{str(path)!r}: {said}"


def check_counts(described: dict[str, Any], tensors: int) -> None:
    """Raise ValueError if config.json asks for many more layers, experts, labels, ... than the files can hold.

    Args:
        described: config.json.
        tensors: how many the files hold.
    """
    for key, number in _numbers("", described):
        counts = _COUNT.search(key) and not _NO_COUNT.search(key)
        if number > max(_ALWAYS, tensors) and (counts or (key == "num_labels" and number > _MOST_LABELS)):
            raise ValueError(f"config.json says that `{key}` is {number}, but the files hold {tensors} tensors.")


def _numbers(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number in an entry, with the last key above it."""
    if isinstance(value, int | float):
        yield key, value
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(key, inner)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in _LABELS:
                yield from _numbers(name, inner)
