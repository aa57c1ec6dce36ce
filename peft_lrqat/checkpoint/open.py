"""Whatever holds a trained model becomes a `Source`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..formats.source import Source


def open_source(model_or_dir: Any) -> Source:
    """Open a model or a folder for export; see the module's docstring.

    Raises:
        ValueError: it holds no quantized layer, or is of a kind that cannot be read; the message says what to do.
        FileNotFoundError: there is no such folder.
    """
    if isinstance(model_or_dir, Source):
        return model_or_dir
    if isinstance(model_or_dir, str | os.PathLike):
        return _open_folder(Path(model_or_dir))
    from ..checkpoint.model_source import ModelSource

    return ModelSource(model_or_dir)


def _open_folder(folder: Path) -> Source:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}. (A repository of the Hub: download it first.)")
    if (folder / "adapter_config.json").exists():
        from ..checkpoint.model_source import adapter_source

        return adapter_source(folder)
    if not (folder / "config.json").exists():
        raise ValueError(
            f"The folder {str(folder)!r} holds neither config.json nor adapter_config.json, so it is neither a merged "
            "checkpoint nor an adapter."
        )
    from ..checkpoint.layouts import open_checkpoint

    return open_checkpoint(folder)
