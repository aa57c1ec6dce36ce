"""Loading a checkpoint with the engine that it is for, and comparing it with where it came from."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..formats.source import Source
from ..grid import GridTensor
from ..modules.packed import merged_layer
from .folder import FolderSource
from .open import open_source
from .verify_gguf import gguf_file, verify_file

#: Format -> packages that transformers needs to load it.
_NEEDS = {"compressed-tensors": ["compressed_tensors"], "gptq": ["optimum", "gptqmodel"], "torchao": ["torchao"],
          "bitnet": []}  # fmt: skip
_TOKENS = 24


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        what: what was compared.
        equal: whether it passed.
        detail: the numbers.
    """

    what: str
    equal: bool
    detail: str


@dataclass
class Verification:
    """What `verify` found; true if every comparison passed.

    Attributes:
        engine: what loaded the checkpoint, None if nothing that could is installed.
        missing: packages that were not found.
        skipped: why the engine was not compared although it is installed, or nothing. Not a comparison that passed.
    """

    engine: str | None = None
    missing: list[str] = field(default_factory=list)
    skipped: str = ""
    findings: list[Finding] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.findings) and all(finding.equal for finding in self.findings)


def verify(
    folder: str | os.PathLike,
    against: Any = None,
    *,
    engine: bool = True,
    progress: Callable[[str], None] = lambda what: None,
) -> Verification:
    """Compare a checkpoint's integers, scales and other tensors with their source, and what an engine makes of them.

    Args:
        folder: a checkpoint in one of the formats of `export`.
        against: what it was made from, as `export` takes it. None: the engine is compared with the file itself.
        engine: load the checkpoint with transformers and compare its layers and logits.

    Raises:
        ValueError, FileNotFoundError: as for `open_source`.
    """
    file = gguf_file(Path(folder))
    if file is not None:
        if against is None:
            raise ValueError(f"A GGUF file is compared with what it was made from: say what {file.name} is `against`.")
        return verify_file(file, open_source(against), engine, progress)
    found = Verification()
    checkpoint = open_source(Path(folder))
    if not isinstance(checkpoint, FolderSource):
        raise ValueError(f"{str(folder)!r} holds an adapter. Export it first; `against` takes the adapter.")
    source: Source = checkpoint
    if against is not None:
        progress("integers and scales")
        source = open_source(against)
        found.findings += [_integers(checkpoint, source), _floats(checkpoint, source)]
    if not engine:
        return found
    found.missing = [name for name in _NEEDS[checkpoint.format] if importlib.util.find_spec(name) is None]
    if found.missing:
        return found
    found.engine = " + ".join([f"transformers {transformers.__version__}", *_NEEDS[checkpoint.format]])
    progress(f"loading with {found.engine}")
    dtype = torch.float16 if checkpoint.format == "gptq" else checkpoint.config.dtype
    model = _architecture(checkpoint).from_pretrained(str(folder), dtype=dtype).eval()
    progress("logits")  # first: transformers unpacks some formats in the first forward
    found.findings.append(_logits(model, source, exact=checkpoint.format != "gptq"))
    progress("layers")
    if checkpoint.activations != "compressed-tensors":
        found.findings.append(_layers(model, source))
    return found


def _architecture(source: Source) -> Any:
    name = (source.config.architectures or [""])[0]
    if not hasattr(transformers, name):
        raise ValueError(f"The architecture {name!r} is not one of transformers' own; it cannot be loaded here.")
    return getattr(transformers, name)


def _integers(checkpoint: Source, source: Source) -> Finding:
    what, grids = "codes, scales, zero points", checkpoint.grids()
    linears = {name for name, info in source.grids().items() if info.kind == "linear"}
    if linears != set(grids):
        return Finding(what, False, f"other layers: {sorted(linears ^ set(grids))[:3]}")
    different = [name for name in grids if not _equal(checkpoint.layer(name), source.layer(name))]
    weights = sum(info.weights for info in grids.values())
    if different:
        return Finding(what, False, f"{len(different)} of {len(grids)} layers differ: {different[0]}, ...")
    return Finding(what, True, f"{len(grids)} layers, {weights:,} weights: all equal")


def _equal(a: GridTensor, b: GridTensor) -> bool:
    if a.codes.shape != b.codes.shape or not torch.equal(a.codes, b.codes.cpu()):
        return False
    pairs = [(a.scale, b.scale)]
    if a.zero_point is not None or b.zero_point is not None:
        zeros = [torch.zeros_like(t.scale, dtype=torch.int8) if t.zero_point is None else t.zero_point for t in (a, b)]
        pairs.append((zeros[0], zeros[1]))
    for left, right in pairs:
        rows, groups = max(len(left), len(right)), max(left.shape[1], right.shape[1])
        spread = [t.cpu().repeat_interleave(groups // t.shape[1], 1).expand(rows, -1) for t in (left, right)]
        if spread[0].shape != spread[1].shape or not torch.equal(spread[0], spread[1]):
            return False
    return True


def _floats(checkpoint: Source, source: Source) -> Finding:
    what, expected = "other tensors", dict(source.floats(checkpoint.grids()))
    count = 0
    for name, tensor in checkpoint.floats(checkpoint.grids()):
        other = expected.pop(name, None)
        if other is None or other.dtype != tensor.dtype or not torch.equal(tensor, other.cpu()):
            return Finding(what, False, f"{name} " + ("is not in the source" if other is None else "differs"))
        count += 1
    if expected:
        return Finding(what, False, f"missing: {', '.join(list(expected)[:3])}")
    return Finding(what, True, f"{count} tensors: all equal")


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
        bits = source.grids()[name].grid.code_bits
        model.set_submodule(
            name, merged_layer(source.layer(name), old.bias, bits, dtype, activations=source.activations)
        )
    _, unexpected = model.load_state_dict(dict(source.floats(packed)), strict=False)
    assert not unexpected, unexpected
    model.tie_weights()
    return model
