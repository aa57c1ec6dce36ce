"""Whatever holds a trained model becomes a `Source`.

* a model that `merge_and_unload()` gave                                (`model_source.py`)
* a PeftModel with LR-QAT or low-bit SR adapters; a layer is merged when it is read, and the model stays as it is
* a folder with a merged, exported or foreign checkpoint, read tensor by tensor  (`folder.py`)
* a folder with an adapter: the base model is loaded, and it is a PeftModel again
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..files import check_utf8, read_json
from ..formats.source import Source
from .damage import naming
from .folder import FolderSource
from .model_source import ModelSource, adapter_source


def open_source(model_or_dir: Any, trust_remote_code: bool = False) -> Source:
    """Open a model or a folder for export; see the module's docstring.

    Args:
        trust_remote_code: whether Python files in the folder, or beside an adapter's base model, may be run.

    Raises:
        ValueError: it holds no quantized layer, is of a kind that cannot be read, or is incomplete or damaged; the
            message says what to do.
        FileNotFoundError: there is no such folder.
    """
    if isinstance(model_or_dir, Source):
        return model_or_dir
    if isinstance(model_or_dir, str | os.PathLike):
        return _open_folder(Path(model_or_dir), trust_remote_code)
    return ModelSource(model_or_dir)


def _open_folder(folder: Path, trust_remote_code: bool) -> Source:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}. (A repository of the Hub: download it first.)")
    check_utf8(folder.resolve())
    if (folder / "adapter_config.json").exists():
        read_json(folder / "adapter_config.json")  # PEFT reads it again, and says less
        with naming(folder):
            return adapter_source(folder, trust_remote_code)
    if not (folder / "config.json").exists():
        raise ValueError(
            f"The folder {str(folder)!r} holds neither config.json nor adapter_config.json, so it is neither a merged "
            "checkpoint nor an adapter."
        )
    with naming(folder):
        return FolderSource(folder, trust_remote_code=trust_remote_code)
