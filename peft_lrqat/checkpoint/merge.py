"""`merge`: an adapter on its base model, as the quantized checkpoint that `merge_and_unload()` gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers.utils.logging import is_progress_bar_enabled

from ..files import new_folder
from ..formats.shards import parse_size
from ..formats.source import LayerInfo
from .export import check_written, save_tokenizer, tokenizer_of
from .findings import Report
from .folder import FolderSource
from .hub import fetched
from .model_source import ModelSource
from .open import open_adapter
from .places import check_apart, fetched_apart
from .serving import Serving, stored_serving


def merge(
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    trust_remote_code: bool = False,
) -> Report:
    """Load an adapter's base model and the adapter, merge, and save the model with its tokenizer.

    The result is what `merge_and_unload()` and `save_pretrained` write: compressed-tensors, BitNet's format, or floats
    that lie on the grid, of layers that neither can pack (Conv1D). The folder appears when it is complete, and what it
    holds was read back and compared with the merged model.

    Args:
        adapter: the folder of an LR-QAT or low-bit SR adapter, or its repository on the Hub.
        out, tokenizer, overwrite, max_shard_size, trust_remote_code: as for `export`.

    Raises:
        ValueError: there is no adapter of these methods, or the base model cannot be loaded.
        OSError: as for `export`.
    """
    out, size = Path(out), parse_size(max_shard_size)
    check_apart(out, adapter, tokenizer)
    with new_folder(out, overwrite) as folder:
        place = fetched(fetched_apart(out, adapter, tokenizer))
        peft_model, its_tokenizer = open_adapter(place, trust_remote_code)
        found = tokenizer_of(tokenizer or its_tokenizer, trust_remote_code)
        layers = ModelSource(peft_model).grids()
        model = peft_model.merge_and_unload(progressbar=is_progress_bar_enabled())
        model.save_pretrained(folder, max_shard_size=size)
        save_tokenizer(found, folder)
        report = _report(model, layers, folder, out)
    return report


def _report(model: Any, layers: dict[str, LayerInfo], folder: Path, out: Path) -> Report:
    """What was written, which is compared with the model if it is packed.

    Args:
        layers: those on the grid, before they were merged.
    """
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if getattr(model.config, "quantization_config", None) is None:
        packed, format, container, served = {}, "safetensors", "floats", Serving()
        layer_bytes = sum(info.weights * info.dtype.itemsize for info in layers.values())
    else:
        check_written(ModelSource(model), folder)
        checkpoint = FolderSource(folder, model.config)
        served = stored_serving(checkpoint)
        packed, format, layer_bytes = checkpoint.grids(), checkpoint.format, checkpoint.layer_bytes()
        widths = sorted({info.container_bits for info in packed.values()})
        container = f"{' and '.join(map(str, widths))} bits"
    counted = packed or layers
    return Report(
        format,
        out,
        container,
        ", ".join(dict.fromkeys(info.grid.describe() for info in counted.values())),
        len(counted),
        sum(info.weights for info in counted.values()),
        layer_bytes,
        size,
        tuple(name for name in layers if name not in packed) if packed else (),
        notes=served.notes,
    )
