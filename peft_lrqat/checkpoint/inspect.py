"""What a checkpoint holds: grid, container, size, exactness of its scales, and how its codes are distributed."""

from __future__ import annotations

import os

import torch

from ..formats.source import Source
from .engines import Engine, engines
from .findings import Inspection
from .folder import FolderSource
from .hub import called, fetched
from .inspect_gguf import inspect_file
from .open import open_source
from .verify_gguf import gguf_file


def inspect(folder: str | os.PathLike, *, trust_remote_code: bool = False) -> Inspection:
    """Look at a merged or exported checkpoint, or at an adapter (whose base model is loaded).

    Args:
        folder: a folder, a GGUF file or a repository of the Hub.
        trust_remote_code: whether Python files that the model brings along may be run.

    Raises:
        ValueError, FileNotFoundError: as for `open_source`.
    """
    folder = fetched(folder)
    file = gguf_file(folder)
    if file is not None:
        return inspect_file(file)
    source = open_source(folder, trust_remote_code)
    infos = source.grids()
    first = next(iter(infos.values()))
    counts: dict[int, int] = dict.fromkeys(range(first.grid.qmin, first.grid.qmax + 1), 0)
    scales, inexact = 0, {"float16": 0, "bfloat16": 0}
    for name in infos:
        weight = source.layer(name)
        low = int(weight.codes.min())
        for offset, count in enumerate(torch.bincount(weight.codes.flatten().int() - low).tolist()):
            counts[low + offset] = counts.get(low + offset, 0) + count
        scales += weight.scale.numel()
        for dtype in (torch.float16, torch.bfloat16):
            inexact[str(dtype).split(".")[1]] += int((weight.scale.to(dtype).float() != weight.scale).sum())
    on_disk = source if isinstance(source, FolderSource) else None  # an adapter: not merged yet
    return Inspection(
        folder=called(folder) or str(folder),
        format="adapter" if on_disk is None else on_disk.format,
        grid=", ".join(dict.fromkeys(info.grid.describe() for info in infos.values())),
        bits=first.grid.bits,
        group_size=first.grid.group_size,
        symmetric=first.grid.symmetric,
        act_bits=min(source.act_bits, default=None),
        kv_cache=None if source.cache is None else source.cache.describe(),
        container_bits=first.container_bits,
        layers=len(infos),
        weights=sum(info.weights for info in infos.values()),
        layer_bytes=None if on_disk is None else on_disk.layer_bytes(),
        total_bytes=None if on_disk is None else on_disk.total_bytes(),
        scales=scales,
        inexact_scales=inexact,
        scale_dtype=source.scale_dtype,
        recipe=source.recipe,
        histogram=dict(sorted(counts.items())),
        engines=_engines(source),
    )


def _engines(source: Source) -> list[Engine]:
    if not isinstance(source, FolderSource):
        return [Engine("PEFT + peft-lrqat", True, "merge or export it for other engines")]
    infos = list(source.grids().values())
    group = source.file_group
    bits = infos[0].container_bits
    parts = source.expert_parts()
    found = engines(source.format, infos, bits, group, source.config, source.problem(), source.cache, parts)
    start = _start(source)
    return [*found, Engine("peft_lrqat.load_quantized", True, start)] if start else found


def _start(source: FolderSource) -> str:
    """What to know about training an adapter on a checkpoint; nothing where every road leads there."""
    found = []
    if source.fixed_point_bits is not None:
        found.append(f"LR-QAT starts from it with bits={source.fixed_point_bits}, at the fraction of each weight")
    if source.expert_parts():
        found.append("an adapter needs it loaded so: transformers alone makes floats of the experts")
    return "; ".join(found)
