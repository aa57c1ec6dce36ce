"""Whatever holds a trained model becomes a `Source`.

* a model that `merge_and_unload()` gave                                (`model_source.py`)
* a PeftModel with LR-QAT or low-bit SR adapters; a layer is merged when it is read, and the model stays as it is
* a folder with a merged, exported or foreign checkpoint, read tensor by tensor  (`folder.py`)
* a folder with an adapter: the base model is loaded, and it is a PeftModel again
* a repository of the Hub with either, which is downloaded              (`hub.py`)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import check_utf8, read_json
from ..formats.source import Source
from .damage import naming
from .folder import FolderSource
from .hub import fetched
from .model_source import ModelSource, load_adapter


def open_source(model_or_dir: Any, trust_remote_code: bool = False) -> Source:
    """Open a model, a folder or a repository for export; see the module's docstring.

    Args:
        model_or_dir: a repository is a string, as `hub.py` says.
        trust_remote_code: whether Python files in the folder, or beside an adapter's base model, may be run.

    Raises:
        ValueError: it holds no quantized layer, is of a kind that cannot be read, or is incomplete or damaged; the
            message says what to do.
        FileNotFoundError: there is no such folder, nor such a repository.
        OSError: the Hub was not reached.
    """
    if isinstance(model_or_dir, Source):
        return model_or_dir
    if isinstance(model_or_dir, str | os.PathLike):
        return _open_folder(fetched(model_or_dir), trust_remote_code)
    return ModelSource(model_or_dir)


def _open_folder(folder: Path, trust_remote_code: bool) -> Source:
    if (folder / "adapter_config.json").exists():
        return ModelSource(*open_adapter(folder, trust_remote_code))
    _check_is_folder(folder)
    if not (folder / "config.json").exists():
        raise ValueError(
            f"The folder {str(folder)!r} holds neither config.json nor adapter_config.json, so it is neither a merged "
            f"checkpoint nor an adapter. (A GGUF file is named itself.){_inside(folder)}"
        )
    with naming(folder):
        return FolderSource(folder, trust_remote_code=trust_remote_code)


def open_adapter(folder: Path, trust_remote_code: bool = False) -> tuple[Any, str | None]:
    """The PeftModel of an adapter's folder, and where its tokenizer is (None: nowhere).

    Raises:
        ValueError: the folder holds no adapter of this package's methods, or it or the base model cannot be read.
    """
    _check_is_folder(folder)
    if not (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{str(folder)!r} holds no adapter (no adapter_config.json). A checkpoint that is merged already is "
            f"written in other formats by `export`.{_inside(folder)}"
        )
    read_json(folder / "adapter_config.json")  # PEFT reads it again, and says less
    with naming(folder):
        return load_adapter(folder, trust_remote_code)


def _inside(folder: Path) -> str:
    """A sentence on the checkpoints of a Trainer in its `output_dir`, or nothing."""
    there = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/adapter_config.json")]
    if not there:
        return ""
    last = max(there, key=lambda path: (len(path.name), path.name))  # by the number of its step
    return f" {str(last)!r} holds one. (`trainer.save_model()` writes the last one into the folder itself.)"


def _check_is_folder(folder: Path) -> None:
    """Raise ValueError if `folder` is a file, or has a name that safetensors cannot open."""
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file. Name the folder of a checkpoint or of an adapter.")
    check_utf8(folder.resolve())
