"""Comparing a checkpoint with where it came from, and loading it with transformers, as engines would."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..formats.source import Source
from ..modules.packed import merged_layer
from . import compare
from .damage import naming
from .findings import Finding, Verification
from .folder import FolderSource
from .open import open_source
from .verify_gguf import gguf_file, verify_file

#: Format -> packages that transformers needs to load it.
_NEEDS = {"compressed-tensors": ["compressed_tensors"], "gptq": ["optimum", "gptqmodel"], "torchao": ["torchao"],
          "awq": ["gptqmodel"], "bitnet": []}  # fmt: skip
_TOKENS = 24


def verify(
    folder: str | os.PathLike,
    against: Any = None,
    *,
    engine: bool = True,
    progress: Callable[[str], None] = lambda what: None,
) -> Verification:
    """Compare a checkpoint's integers, scales and other tensors with their source, and what transformers makes of them.

    transformers loads every format here (GPTQ and AWQ with gptqmodel's kernels); other engines, such as vLLM, are not
    run.

    Args:
        folder: a checkpoint in one of the formats of `export`.
        against: what it was made from, as `export` takes it. None: what transformers computes is compared with the
            integers and scales of the files themselves.
        engine: load the checkpoint with transformers and compare its layers and logits.

    Raises:
        ValueError, FileNotFoundError: as for `open_source`.
    """
    file = gguf_file(Path(folder))
    if file is not None:
        if against is None:
            raise ValueError(f"A GGUF file is compared with what it was made from: say what {file.name} is `against`.")
        found = verify_file(file, open_source(against), engine, progress)
        found.against = described(against)
        return found
    checkpoint = open_source(Path(folder))
    if not isinstance(checkpoint, FolderSource):
        raise ValueError(f"{str(folder)!r} holds an adapter. Export it first; `against` takes the adapter.")
    source: Source = checkpoint
    found = Verification(f"{folder} ({checkpoint.format})", "the integers and scales of its own files")
    if against is not None:
        progress("integers and scales")
        source = open_source(against)
        found.against = described(against)
        found.findings += [compare.integers(checkpoint, source), compare.floats(checkpoint, source)]
        if checkpoint.rules() != source.rules():
            found.findings.append(compare.rules(checkpoint, source))
    if not engine:
        return found
    found.missing = [name for name in _NEEDS[checkpoint.format] if importlib.util.find_spec(name) is None]
    if found.missing:
        return found
    found.engine = " + ".join([f"transformers {transformers.__version__}", *_NEEDS[checkpoint.format]])
    progress(f"loading with {found.engine}")
    half = checkpoint.format in ("gptq", "awq")  # its kernels compute in fp16
    dtype = torch.float16 if half else checkpoint.config.dtype
    with naming(Path(folder)):
        model = _architecture(checkpoint).from_pretrained(str(folder), dtype=dtype).eval()
    progress("logits")  # first: transformers unpacks some formats in the first forward
    found.findings.append(_logits(model, source, exact=not half))
    progress("layers")
    if "compressed-tensors" not in checkpoint.rules():  # such a layer's answer to unit vectors is rounded
        found.findings.append(_layers(model, source))
    return found


def described(against: Any) -> str:
    """What a checkpoint is compared with, in words."""
    return str(against) if isinstance(against, str | os.PathLike) else f"the {type(against).__name__} in memory"


def _architecture(source: Source) -> Any:
    name = (source.config.architectures or [""])[0]
    if not hasattr(transformers, name):
        raise ValueError(f"The architecture {name!r} is not one of transformers' own; it cannot be loaded here.")
    return getattr(transformers, name)


@contextmanager
def _without_bias(module: Any) -> Iterator[None]:
    bias = getattr(module, "bias", None)
    if bias is None:
        yield
        return
    saved = bias.clone()
    bias.zero_()
    try:
        yield
    finally:
        bias.copy_(saved)


@torch.no_grad()
def _layers(model: Any, source: Source) -> Finding:
    """Each layer's own answer to the unit vectors is its weight."""
    what, different, largest = "the engine's weights", [], 0.0
    names = [name for name, info in source.grids().items() if info.kind == "linear"]
    for name in names:
        module: Any = model.get_submodule(name)
        weight = source.layer(name)
        with _without_bias(module):
            answer = module(torch.eye(weight.codes.shape[1], dtype=model.dtype))
        expected = weight.dequantize(model.dtype).t()
        largest = max(largest, float((answer.float() - expected.float()).abs().max() / weight.scale.abs().max()))
        if not torch.equal(answer, expected):
            different.append(name)
    detail = f"{len(names) - len(different)} of {len(names)} layers equal; largest difference {largest:.1e} grid steps"
    return Finding(what, not different, detail)


@torch.no_grad()
def _logits(model: Any, source: Source, exact: bool) -> Finding:
    """The engine's logits beside those of the model as it was trained."""
    reference = _reference(source, model.dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, source.config.get_text_config().vocab_size, (1, _TOKENS), generator=generator)
    got, expected = model(input_ids=ids)[0].float(), reference(input_ids=ids)[0].float()
    difference, size = float((got - expected).abs().max()), float(expected.abs().max())
    best = float((got.argmax(-1) == expected.argmax(-1)).float().mean())
    detail = f"largest difference {difference:.2e} (logits reach {size:.2f}), same best token at {best:.0%}"
    return Finding("logits", torch.equal(got, expected) if exact else difference < 0.02 * size, detail)


def _reference(source: Source, dtype: torch.dtype) -> nn.Module:
    """The merged model, built from the source."""
    model = _architecture(source)._from_config(source.config, dtype=dtype).eval()
    packed = [name for name, info in source.grids().items() if info.kind == "linear"]
    for name in packed:
        old: Any = model.get_submodule(name)
        info = source.grids()[name]
        layer = merged_layer(source.layer(name), old.bias, info.grid.code_bits, dtype, activations=info.activations)
        model.set_submodule(name, layer)
    _, unexpected = model.load_state_dict(dict(source.floats(packed)), strict=False)
    assert not unexpected, unexpected
    model.tie_weights()
    return model
