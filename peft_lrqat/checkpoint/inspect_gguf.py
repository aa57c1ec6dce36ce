"""What a GGUF file holds, for people."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch

from ..formats.gguf import choice
from ..formats.gguf.blocks import BLOCK_TYPES
from ..formats.gguf.reader import GGUFFile
from ..formats.gguf.writer import GRID_KEY, LAYERS_KEY
from ..grid import Grid
from .engines import Engine
from .findings import Inspection

#: llama.cpp's names of the mixtures that transformers reads from GGUF.
_MIXTURES_OF_TRANSFORMERS = ("qwen2moe", "qwen3moe")


def inspect_file(path: Path) -> Inspection:
    """`inspect` for a GGUF file: an `Inspection`. The histogram counts levels, q - z.

    Raises:
        ValueError: it is no GGUF file, is damaged, or was not written by this package.
    """
    file = GGUFFile(path)
    names = _layers(file)
    grid, group_size, symmetric = _grid(file)
    counts: Counter[int] = Counter()
    scales, inexact, weights, layer_bytes = 0, {"float16": 0, "bfloat16": 0}, 0, 0
    for name in names:
        stored = file.tensors[name]
        for matrix in file.matrices(name):
            levels, scale = choice.from_blocks(matrix, BLOCK_TYPES[stored.type])
            if not bool(torch.isfinite(scale).all()):
                raise ValueError(
                    f"{str(path)!r}: tensor {name!r} has scales that are infinite or NaN. Download it again."
                )
            low = int(levels.min())
            for offset, count in enumerate(torch.bincount(levels.flatten().int() - low).tolist()):
                counts[low + offset] += count
            scales += scale.numel()
            inexact["bfloat16"] += int((scale.bfloat16().float() != scale).sum())
        weights += math.prod(stored.shape)
        layer_bytes += stored.bytes
    types = Counter(file.tensors[name].type for name in names)
    return Inspection(
        folder=str(path),
        format="gguf (" + ", ".join(f"{kind.upper()}: {count}" for kind, count in types.most_common()) + ")",
        grid=grid.describe(),
        bits=grid.bits,
        group_size=group_size,
        symmetric=symmetric,
        act_bits=None,
        kv_cache=None,
        container_bits=max((BLOCK_TYPES[kind].highest - BLOCK_TYPES[kind].lowest).bit_length() for kind in types),
        layers=sum(math.prod(file.tensors[name].shape[:-2]) for name in names),
        weights=weights,
        layer_bytes=layer_bytes,
        total_bytes=sum(tensor.bytes for tensor in file.tensors.values()),
        scales=scales,
        inexact_scales=inexact,
        scale_dtype=None,
        recipe=str(file.metadata.get("general.description") or "") or None,
        histogram={level: counts[level] for level in range(min(counts), max(counts) + 1)},
        engines=_engines(file, set(types)),
    )


def _layers(file: GGUFFile) -> list[str]:
    """The tensors in blocks that were written from a grid."""
    named = file.metadata.get(LAYERS_KEY)
    if not isinstance(named, list) or not named:
        raise ValueError(f"{str(file.path)!r} has no tensors that this package wrote from a grid.")
    known = {name for name, tensor in file.tensors.items() if len(tensor.shape) in (2, 3)}
    lost = [name for name in named if not isinstance(name, str) or name not in known]
    if lost or len(set(named)) < len(named):
        what = f"{lost[0]!r}, which is no matrix in it" if lost else "a tensor twice"
        raise ValueError(f"{str(file.path)!r} is damaged: `{LAYERS_KEY}` names {what}.")
    names = [name for name in named if file.tensors[name].type in BLOCK_TYPES]
    if not names:
        raise ValueError(f"{str(file.path)!r} has its layers as floats (`type='f32'`), not in blocks.")
    return names


def _grid(file: GGUFFile) -> tuple[Grid, int, bool]:
    said = file.metadata.get(GRID_KEY)
    try:
        bits, group_size, symmetric = said  # type: ignore[misc]  # whatever a file holds
        # float32 in the file: 1.58 comes back a little off
        grid = Grid(int(bits) if bits == int(bits) else round(bits, 2), int(group_size), bool(symmetric))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{str(file.path)!r} is damaged: `{GRID_KEY}` is {said!r}, no grid.") from error
    return grid, grid.group_size, grid.symmetric


def transformers_cannot(file: GGUFFile) -> str:
    """Why transformers cannot load a file that this package wrote, or nothing."""
    arch = file.metadata.get("general.architecture")
    if any(tensor.type == "q2_0" for tensor in file.tensors.values()):
        return "does not know Q2_0"
    if f"{arch}.expert_count" in file.metadata and arch not in _MIXTURES_OF_TRANSFORMERS:
        return "takes a Mixtral for a Llama without experts" if arch == "llama" else f"does not know {arch!r}"
    return ""


def _engines(file: GGUFFile, types: set[str]) -> list[Engine]:
    new = "q2_0" in types
    why = transformers_cannot(file)
    return [
        Engine("llama.cpp", True, "rounds activations to 8 bits; Q2_0 needs a version of 2026" if new else
               "rounds activations to 8 bits"),
        Engine("transformers + gguf", not why, why or "as floats"),
    ]  # fmt: skip
