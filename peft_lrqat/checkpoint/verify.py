"""Comparing a checkpoint with where it came from, and loading it with transformers, as engines would."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import transformers
from torch import nn

from ..formats import bitnet, compressed_tensors
from ..formats.source import Source
from ..modules.architecture import expose_experts, joined_weights
from ..modules.kv_cache import round_cache
from ..modules.packed import merged_layer
from . import compare
from .code import class_of
from .damage import naming
from .findings import Finding, Verification
from .folder import FolderSource
from .hub import called, fetched
from .load import load_quantized
from .model_source import ModelSource
from .open import open_source
from .serving import stored_serving
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
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> Verification:
    """Compare a checkpoint's integers, scales and other tensors with their source, and what transformers makes of them.

    transformers loads every format here (GPTQ and AWQ with gptqmodel's kernels); other engines, such as vLLM, are not
    run.

    Args:
        folder: a checkpoint in one of the formats of `export`: a folder, a GGUF file or a repository of the Hub.
        against: what it was made from, as `export` takes it. None: what transformers computes is compared with the
            integers and scales of the files themselves.
        engine: load the checkpoint with transformers and compare its layers and logits.
        trust_remote_code: whether Python files that the model brings along may be run.

    Raises:
        ValueError, FileNotFoundError: as for `open_source`.
    """
    folder = fetched(folder)
    file = gguf_file(folder)
    if file is not None:
        if against is None:
            raise ValueError(f"A GGUF file is compared with what it was made from: say what {file.name} is `against`.")
        found = verify_file(file, open_source(against, trust_remote_code), engine, progress)
        found.against = described(against)
        return found
    checkpoint = open_source(folder, trust_remote_code)
    if not isinstance(checkpoint, FolderSource):
        raise ValueError(f"{str(folder)!r} holds an adapter. Export it first; `against` takes the adapter.")
    source: Source = checkpoint
    found = Verification(
        f"{called(folder) or folder} ({checkpoint.format})", "the integers and scales of its own files"
    )
    found.notes = stored_serving(checkpoint).notes
    if against is not None:
        progress("integers and scales")
        source = open_source(against, trust_remote_code)
        found.against = described(against)
        found.findings += [compare.integers(checkpoint, source), compare.floats(checkpoint, source)]
        if checkpoint.activations() != source.activations():
            found.findings.append(compare.activations(checkpoint, source))
        if (checkpoint.cache, source.cache) != (None, None):
            found.findings.append(compare.caches(checkpoint, source))
    if not engine:
        return found
    if _shapes(checkpoint) != _shapes(source):
        found.skipped = "the two are models of other layers or sizes"
        return found
    found.skipped = checkpoint.problem() or _other_rule(checkpoint)
    if found.skipped:  # whatever is installed
        return found
    found.missing = [name for name in _NEEDS[checkpoint.format] if importlib.util.find_spec(name) is None]
    if found.missing:
        return found
    found.engine = " + ".join([f"transformers {transformers.__version__}", *_NEEDS[checkpoint.format]])
    progress(f"loading with {found.engine}")
    half = checkpoint.format in ("gptq", "awq")  # its kernels compute in fp16
    dtype = torch.float16 if half else checkpoint.config.dtype
    kind = _class_of(checkpoint)
    with naming(folder):
        model = kind.from_pretrained(str(folder), dtype=dtype, trust_remote_code=trust_remote_code).eval()
    done = (compressed_tensors.NAME, "transformers")
    if (cache := checkpoint.cache) is not None and (checkpoint.format, cache.rule) != done:
        round_cache(model, cache)  # which transformers cannot: the rest is compared
    progress("logits")  # first: transformers unpacks some formats in the first forward
    found.findings.append(_outputs(model, source, exact=not half))
    progress("layers")
    if checkpoint.activations() <= {None, bitnet.ACTIVATIONS}:  # another's answer to unit vectors is rounded
        found.findings.append(_layers(model, source))
    return found


def _shapes(source: Source) -> tuple[Any, dict[str, tuple[int, int]]]:
    """What two sources of one architecture have in common: the vocabulary's size, and the sizes of linear layers."""
    linears = {name: info for name, info in source.grids().items() if info.kind == "linear"}
    sizes = {name: (info.out_features, info.in_features) for name, info in linears.items()}
    return getattr(source.config.get_text_config(), "vocab_size", None), sizes


def _other_rule(checkpoint: Source) -> str:
    """Why transformers computes something else than was trained, or nothing."""
    rules = {how.rule for how in checkpoint.activations() if how is not None}
    if rules <= {compressed_tensors.NAME, bitnet.NAME}:
        return ""
    return "it was trained with vLLM's rounding of activations, and transformers rounds activations otherwise"


def described(against: Any) -> str:
    """What a checkpoint is compared with, in words."""
    if isinstance(against, str | os.PathLike):
        return called(against) or str(against)
    return f"the {type(against).__name__} in memory"


def _class_of(source: FolderSource) -> Any:
    kind = class_of(source.config, source.trust_remote_code)
    if kind is None:
        name = (source.config.architectures or [""])[0]
        raise ValueError(
            f"The architecture {name!r} is not one of transformers' own; it cannot be loaded here. If its Python files "
            "are in the folder, and you trust them, pass trust_remote_code=True; or compare the files only, with "
            "engine=False."
        )
    return kind


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
    """Each layer's own answer to the unit vectors is its weight; experts that transformers joins give theirs."""
    what, different, largest = "the engine's weights", [], 0.0
    names = [name for name, info in source.grids().items() if info.kind == "linear"]
    joined = joined_weights(model)
    for name in names:
        weight, inside = source.layer(name), source.modules.get(name, name)
        if inside in joined:
            answer = joined[inside]().t()
        else:
            module: Any = model.get_submodule(inside)
            with _without_bias(module):
                answer = module(torch.eye(weight.codes.shape[1], dtype=model.dtype))
        expected = weight.dequantize(model.dtype).t()
        largest = max(largest, float((answer.float() - expected.float()).abs().max() / weight.scale.abs().max()))
        if not torch.equal(answer, expected):
            different.append(name)
    detail = f"{len(names) - len(different)} of {len(names)} layers equal; largest difference {largest:.1e} grid steps"
    return Finding(what, not different, detail)


@torch.no_grad()
def _outputs(model: Any, source: Source, exact: bool) -> Finding:
    """The engine's outputs beside those of the model as it was trained: logits, as a rule."""
    reference = _reference(source, model.dtype)
    inputs = _inputs(model)
    got, expected = _answer(model, inputs).float(), _answer(reference, inputs).float()
    difference, size = float((got - expected).abs().max()), float(expected.abs().max())
    best = float((got.argmax(-1) == expected.argmax(-1)).float().mean())
    detail = f"largest difference {difference:.2e} (logits reach {size:.2f}), same best token at {best:.0%}"
    return Finding("logits", torch.equal(got, expected) if exact else difference < 0.02 * size, detail)


def _answer(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a model is for: logits where it has some, else the first of what it returns.

    They need not come first: a mixture puts the router's loss before them if `output_router_logits` is set, as TRL
    does.
    """
    out = model(**inputs)
    return out["logits"] if "logits" in out else out[0]


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    """Random inputs for a model: tokens, an image or a spectrogram, as its `forward` asks for."""
    generator = torch.Generator().manual_seed(0)
    config, text = model.config, model.config.get_text_config()
    asked = signature(model.forward).parameters
    vision = getattr(config, "vision_config", config)
    main = model.main_input_name
    made: dict[str, torch.Tensor] = {}
    places = [getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions")]
    length = min(_TOKENS, *(place for place in places if isinstance(place, int)), _TOKENS)
    if "input_ids" in asked:
        made["input_ids"] = torch.randint(0, text.vocab_size, (1, length), generator=generator)
    if main == "input_features":
        made[main] = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    if main == "pixel_values" or (hasattr(config, "vision_config") and not model.can_generate()):
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        made["pixel_values"] = torch.randn(1, vision.num_channels, height, width, generator=generator)
    if "decoder_input_ids" in asked:
        made["decoder_input_ids"] = torch.randint(0, text.vocab_size, (1, length), generator=generator)
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in made.items()}


def _reference(source: Source, dtype: torch.dtype) -> nn.Module:
    """The merged model, built from the source."""
    if isinstance(source, FolderSource):
        return load_quantized(source.folder, dtype=dtype, trust_remote_code=source.trust_remote_code).eval()
    assert isinstance(source, ModelSource)
    kind: Any = type(source.model)
    model = kind._from_config(source.config, dtype=dtype).eval()
    expose_experts(model, source.grids())
    packed = [name for name, info in source.grids().items() if info.kind == "linear"]
    for name in packed:
        inside, info = source.modules.get(name, name), source.grids()[name]
        old: Any = model.get_submodule(inside)
        layer = merged_layer(source.layer(name), old.bias, info.container_bits, dtype, activations=info.activations)
        model.set_submodule(inside, layer)
    _, unexpected = model.load_state_dict(dict(source.state(packed)), strict=False)
    assert not unexpected, unexpected
    model.tie_weights()
    if source.cache is not None:
        round_cache(model, source.cache)
    return model
