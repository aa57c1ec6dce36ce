"""Whether a GGUF file holds what was trained, and what transformers reads in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from ..formats.gguf import architectures, choice, floats, tensors
from ..formats.gguf.blocks import BLOCK_TYPES
from ..formats.gguf.reader import GGUFFile, StoredTensor
from ..formats.gguf.tensors import Place
from ..formats.source import LayerInfo, Source
from ..modules.architecture import skeleton_of
from .damage import naming
from .findings import Finding, Verification
from .inspect_gguf import transformers_cannot


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
    place = tensors.places(source.config)
    found = {}
    for name, info in source.grids().items():
        difference = _layer_difference(file, place(name + ".weight"), source, name, info)
        if difference:
            found[name] = difference
    return found


def _layer_difference(file: GGUFFile, place: Place, source: Source, name: str, info: LayerInfo) -> str:
    stored = file.tensors.get(place.tensor)
    if stored is None:
        return "missing"
    wanted = tensors.file_shape(place.tensor, info.out_features, info.in_features)
    if (reason := _other_shape(stored, place, wanted, source)) or (
        stored.type not in BLOCK_TYPES and stored.type != "f32"
    ):
        return reason or f"stored as {stored.type}"
    tensor = tensors.in_file_order(source.layer(name), source.config, name)
    data = file.read(place.tensor, place.expert)
    if stored.type == "f32":
        same = torch.equal(data.view(torch.float32), tensor.dequantize(torch.float32))
    else:
        same = choice.holds(data, BLOCK_TYPES[stored.type], tensor)
    return "" if same else f"other integers or scales ({stored.type})"


def _other_shape(stored: StoredTensor, place: Place, wanted: tuple[int, ...], source: Source) -> str:
    """What is wrong with a tensor's shape, of which `wanted` is that of one expert's part; or nothing."""
    shape = wanted if place.expert is None else (architectures.experts(source.config), *wanted)
    return "" if stored.shape == shape else f"of shape {stored.shape}, not {shape}"


def float_differences(file: GGUFFile, source: Source) -> dict[str, str]:
    """The same for every other tensor; embeddings that were rounded are compared with the source's, rounded too."""
    found, grids = {}, source.grids()
    for name, weight in source.floats(grids):
        for place, piece in tensors.float_pieces(name, weight, source.config, grids):
            if reason := _float_difference(file, place, piece, source):
                found[name] = reason
    return found


def _float_difference(file: GGUFFile, place: Place, piece: torch.Tensor, source: Source) -> str:
    stored = file.tensors.get(place.tensor)
    if stored is None:
        return "missing"
    if reason := _other_shape(stored, place, tuple(piece.shape), source):
        return reason
    wanted = floats.store(piece, tensors.float_type(place, piece, "f32" if stored.type == "f32" else "", stored.type))
    same = wanted.type == stored.type and torch.equal(
        wanted.data.flatten(), file.read(place.tensor, place.expert).flatten()
    )
    return "" if same else f"differs ({stored.type})"


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
    layers = against.grids()
    others = len(file.tensors) - len(tensors.matrices(layers, against.config))
    for what, wrong, total in (
        ("levels (codes less zero points) and scales", differences(file, against), f"{len(layers)} layers"),
        ("other tensors", float_differences(file, against), f"{others} tensors"),
    ):
        first = next(iter(wrong.items()), None)
        detail = f"{total}: all equal" if first is None else f"{len(wrong)} differ: {first[0]}: {first[1]}, ..."
        found.findings.append(Finding(what, first is None, detail))
    if not engine:
        return found
    found.missing = [name for name in ("gguf",) if find_spec(name) is None]
    if not found.missing:
        name = f"transformers {version('transformers')} + gguf {version('gguf')}"
        if why := transformers_cannot(file):
            found.skipped = f"{name} cannot load the file: it {why}"
            return found
        progress("loading with transformers")
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
    weights = dict(_weights(model))
    for name in names:
        if not torch.equal(weights[name], source.layer(name).dequantize(torch.float32).cpu()):
            different.append(name)
    first = f": {different[0]}, ..." if different else ""
    return Finding(
        "the engine's weights", not different, f"{len(names) - len(different)} of {len(names)} layers equal{first}"
    )


def _weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name of a module in files -> its weight, those of experts one by one."""
    skeleton = skeleton_of(model)  # which goes back to such names; a model that came from GGUF does not
    for name, weight in revert_weight_conversion(skeleton, model.state_dict()).items():
        yield name.removesuffix(".weight"), weight
