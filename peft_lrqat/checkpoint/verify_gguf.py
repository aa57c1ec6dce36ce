"""Whether a GGUF file holds what was trained, and what transformers reads in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..formats.gguf import architectures, choice, tensors
from ..formats.gguf.blocks import BLOCK_TYPES
from ..formats.gguf.reader import GGUFFile
from ..formats.source import LayerInfo, Source
from .damage import naming
from .findings import Finding, Verification


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file of a folder that `export` wrote, or `folder` itself if it is such a file; else None."""
    if folder.suffix == ".gguf" and not folder.is_dir():
        return folder
    found = sorted(folder.glob("*.gguf"))
    return found[0] if len(found) == 1 and not (folder / "config.json").exists() else None


def differences(file: GGUFFile, source: Source) -> dict[str, str]:
    """Layer -> what differs, for every layer of the source whose integers or scales are not those in the file.

    Read from the blocks, by code that shares nothing with ggml's; the tests compare it with ggml's.
    """
    rename = tensors.file_names(source.config)
    found = {}
    for name, info in source.grids().items():
        difference = _layer_difference(file, rename(name + ".weight"), source, name, info)
        if difference:
            found[name] = difference
    return found


def _layer_difference(file: GGUFFile, key: str, source: Source, name: str, info: LayerInfo) -> str:
    stored = file.tensors.get(key)
    if stored is None:
        return "missing"
    if stored.shape != (info.out_features, info.in_features):
        return f"of shape {stored.shape}, not {(info.out_features, info.in_features)}"
    if stored.type not in BLOCK_TYPES and stored.type != "f32":
        return f"stored as {stored.type}"
    tensor, data = tensors.in_file_order(source.layer(name), source.config, name), file.read(key)
    if stored.type == "f32":
        same = torch.equal(data.view(torch.float32), tensor.dequantize(torch.float32))
    else:
        same = choice.holds(data, BLOCK_TYPES[stored.type], tensor)
    return "" if same else f"other integers or scales ({stored.type})"


def float_differences(file: GGUFFile, source: Source) -> dict[str, str]:
    """The same for every other tensor; embeddings that were rounded are compared with the source's, rounded too."""
    rename = tensors.file_names(source.config)
    found = {}
    for name, weight in source.floats(source.grids()):
        stored = file.tensors.get(rename(name))
        if stored is None:
            found[name] = "missing"
            continue
        wanted = tensors.store_float(name, weight, source.config, "f32" if stored.type == "f32" else "", stored.type)
        if wanted.type != stored.type or not torch.equal(wanted.data.flatten(), file.read(rename(name)).flatten()):
            found[name] = f"differs ({stored.type})"
    return found


def verify_file(path: Path, against: Source, engine: bool, progress: Callable[[str], None]) -> Verification:
    """`verify` for a GGUF file: a `Verification`.

    transformers loads it, which turns the blocks into floats with the package `gguf`; llama.cpp is not run.
    """
    found = Verification(f"{path} (gguf)")
    progress("integers and scales")
    file = GGUFFile(path)
    stored, model_type = file.metadata.get("general.architecture"), against.config.model_type
    arch = architectures.ARCHITECTURES.get(model_type)
    if arch is None or arch.name != stored:
        raise ValueError(f"{path.name} holds a model of kind {stored!r}, the source one of {model_type!r}.")
    count = len(against.grids())
    for what, wrong, total in (
        ("levels (codes less zero points) and scales", differences(file, against), f"{count} layers"),
        ("other tensors", float_differences(file, against), f"{len(file.tensors) - count} tensors"),
    ):
        first = next(iter(wrong.items()), None)
        detail = f"{total}: all equal" if first is None else f"{len(wrong)} differ: {first[0]}: {first[1]}, ..."
        found.findings.append(Finding(what, first is None, detail))
    if not engine:
        return found
    found.missing = [name for name in ("gguf",) if find_spec(name) is None]
    if not found.missing:
        progress("loading with transformers")
        name = f"transformers {version('transformers')} + gguf {version('gguf')}"
        try:
            with naming(path):
                model = _loaded_by_transformers(path, against)
        except ValueError as error:  # a block type or an architecture that it does not know
            found.skipped = f"{name} cannot load the file: {error}"
        else:
            found.findings.append(_transformers_reads(model, against))
            found.engine = name
    return found


def _loaded_by_transformers(path: Path, source: Source) -> Any:
    from transformers import AutoModelForCausalLM

    # With the source's configuration, because transformers reads no head_dim from the file for some architectures; but
    # a Mistral is a Llama in GGUF, and must be to transformers.
    config = None if source.config.model_type == "mistral" else copy.deepcopy(source.config)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=torch.float32)


def _transformers_reads(model: Any, source: Source) -> Finding:
    names, different = list(source.grids()), []
    for name in names:
        weight: Any = model.get_submodule(name).weight
        if not torch.equal(weight, source.layer(name).dequantize(torch.float32).cpu()):
            different.append(name)
    first = f": {different[0]}, ..." if different else ""
    return Finding(
        "the engine's weights", not different, f"{len(names) - len(different)} of {len(names)} layers equal{first}"
    )
