"""Whether what an export writes would replace what it reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from peft import PeftModel

from ..files import read_json
from . import hub
from .folder import FolderSource


def check_apart(out: Path, model_or_dir: Any, tokenizer: Any = None) -> None:
    """Raise FileExistsError if an export into `out` would lose or change what it is made from.

    `out` must not be a folder that is read, or one above it: of the source, of an adapter's base model, of the
    tokenizer, of the files to which links in these lead, and of what a model in memory was loaded from. Nor may it lie
    in the source or the base model. Folders are told apart by what they are, not by how they are written.

    Args:
        model_or_dir, tokenizer: as for `export`.
    """
    out = Path(os.path.realpath(out))
    needed = _needed(model_or_dir)
    for folder in needed:
        if _holds(folder, out):
            raise FileExistsError(
                f"{str(out)!r} is, or lies in, what is exported ({str(folder)!r}), which would be changed or lost. "
                "Name a folder beside it."
            )
    for folder in [*needed, *_used(model_or_dir, tokenizer)]:
        for place in (folder, *_links(folder)):
            if _holds(out, place):
                raise FileExistsError(
                    f"{str(out)!r} has in it what is exported, or what that needs ({str(place)!r}), which would be "
                    "lost. Name another folder."
                )


def fetched_apart(out: Path, model_or_dir: Any, tokenizer: Any = None) -> Any:
    """`model_or_dir`, or the folder of a repository of the Hub, which is downloaded.

    Then the base model of an adapter is known, and `check_apart` is asked once more.
    """
    if hub.repository(model_or_dir) is None:
        return model_or_dir
    folder = hub.fetched(model_or_dir)
    check_apart(out, folder, tokenizer)
    return folder


def _needed(model_or_dir: Any) -> list[Path]:
    """The folder that is exported, and that of an adapter's base model."""
    model_or_dir = model_or_dir.folder if isinstance(model_or_dir, FolderSource) else model_or_dir
    if not isinstance(model_or_dir, str | os.PathLike):
        return []
    folder = Path(model_or_dir)
    config = folder / "adapter_config.json"
    base = _folder(read_json(config).get("base_model_name_or_path")) if config.exists() else []
    return [*_folder(model_or_dir), *base]


def _used(model_or_dir: Any, tokenizer: Any) -> list[Path]:
    """Other folders that must not be lost: the tokenizer's, the Hub's cache, and where a model was loaded from."""
    names = [tokenizer, constants.HF_HUB_CACHE, getattr(model_or_dir, "name_or_path", None)]
    if isinstance(model_or_dir, PeftModel):
        names += [config.base_model_name_or_path for config in model_or_dir.peft_config.values()]
    return [folder for name in names for folder in _folder(name)]


def _folder(name: Any) -> list[Path]:
    """The folder of this name, links resolved, or that of the Hub's cache for a repository, if there is one."""
    if not name or not isinstance(name, str | os.PathLike):
        return []
    folder = hub.cached(name) or name
    return [Path(os.path.realpath(folder))] if os.path.isdir(folder) else []


def _links(folder: Path) -> set[Path]:
    """The folders of the files to which links in `folder` lead."""
    return {Path(os.path.realpath(entry.path)).parent for entry in os.scandir(folder) if entry.is_symlink()}


def _holds(outer: Path, inner: Path) -> bool:
    """Whether `outer` is `inner`, or a folder above it."""
    return outer.exists() and any(p.exists() and os.path.samefile(outer, p) for p in (inner, *inner.parents))
