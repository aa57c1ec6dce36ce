"""Whether a GGUF file holds what was trained."""

from __future__ import annotations

from pathlib import Path

import torch

from ..source import Source
from . import choice, tensors
from .blocks import BLOCK_TYPES
from .reader import GGUFFile


def differences(path: Path, source: Source) -> dict[str, str]:
    """Layer -> what differs, for every layer of the source whose integers or scales are not those in the file.

    Read from the blocks, by code that shares nothing with ggml's; the tests compare it with ggml's.

    Raises:
        ValueError: it is no GGUF file, or is damaged.
    """
    file = GGUFFile(path)
    rename = tensors.file_names(source.config)
    found = {}
    for name, info in source.grids().items():
        stored = file.tensors.get(rename(name + ".weight"))
        if stored is None:
            found[name] = "missing"
        elif stored.shape != (info.out_features, info.in_features):
            found[name] = f"of shape {stored.shape}, not {(info.out_features, info.in_features)}"
        else:
            tensor = tensors.in_file_order(source.layer(name), source.config, name)
            data = file.read(rename(name + ".weight"))
            if stored.type in BLOCK_TYPES:
                same = choice.holds(data, BLOCK_TYPES[stored.type], tensor)
            elif stored.type == "f32":
                same = torch.equal(data.view(torch.float32), tensor.dequantize(torch.float32))
            else:
                found[name] = f"stored as {stored.type}, not on a grid"
                continue
            if not same:
                found[name] = f"other integers or scales ({stored.type})"
    return found
