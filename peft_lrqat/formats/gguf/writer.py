"""The format "gguf": one file with weights, hyperparameters, tokenizer and chat template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...grid import Grid, GridTensor, snap_scale
from ..record import KEY
from ..source import LayerInfo, Source
from ..writer import Loss, Problem, Settings, Writer, Written
from . import architectures, choice, floats, tensors
from .blocks import BLOCK_TYPES, BlockType
from .contents import NotExact
from .spool import Spool
from .tokenizer import write_tokenizer

#: Metadata of this package's own: which tensors are on a grid, and on which.
GRID_KEY, LAYERS_KEY = f"{KEY}.grid", f"{KEY}.layers"

#: What `type` may be: "auto" (the smallest exact one, layer by layer), one of ggml's, or float weights.
TYPES = ("auto", *BLOCK_TYPES, "f32")

# llama.cpp's number for "mostly this type", by which tools describe a file
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 11,
               "q4_k": 14, "q5_k": 16, "q6_k": 18, "bf16": 32, "tq1_0": 36, "tq2_0": 37, "q2_0": 41}  # fmt: skip


@dataclass(frozen=True)
class Options(Writer.Options):
    """How a GGUF file is written."""

    type: str = field(
        default="auto",
        metadata={
            "help": "ggml's type of the quantized layers; auto: the smallest that holds each exactly; f32: float "
            "weights, for tools that pack them themselves."
        },
    )
    embedding_type: str = field(
        default="auto",
        metadata={
            "help": "Type of embeddings and head where they were not trained on a grid; auto: the dtype they have. "
            "q8_0, and f16 for bf16 weights, round them, and the loss is reported."
        },
    )
    tokenizer_pre: str | None = field(
        default=None, metadata={"help": "llama.cpp's name of the pre-tokenizer, where it is not recognised."}
    )
    vocabulary: bool = field(
        default=True, metadata={"help": "False: a file without a tokenizer, which takes token ids only."}
    )

    def __post_init__(self) -> None:
        for name, allowed in (("type", TYPES), ("embedding_type", floats.FLOAT_TYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; allowed are {', '.join(allowed)}.")
        if not isinstance(self.vocabulary, bool):
            raise ValueError(f"`vocabulary` is {self.vocabulary!r}; allowed are True and False.")


class GGUFWriter(Writer):
    """llama.cpp's format."""

    name = "gguf"
    needs = ("gguf",)
    tokenizer_files = False
    Options = Options
    usage = """```bash
llama-cli -m path/to/file.gguf
llama-server -m path/to/file.gguf
```"""

    def problems(self, source: Source, settings: Settings) -> list[Problem]:
        options: Options = settings.options
        reason = architectures.unsupported(source.config)
        if reason is not None:
            return [Problem(None, reason, "another format, such as 'compressed-tensors'")]
        try:
            tensors.matrices(source.grids(), source.config)
        except ValueError as error:
            return [Problem(None, str(error), "another format, such as 'compressed-tensors'")]
        found = []
        if settings.container_bits is not None:
            found.append(Problem(None, "`container_bits` means nothing in GGUF", "choose the container with `type`"))
        for name, info in source.grids().items():
            problem = layer_problem(info, options)
            if problem is None and options.type != "f32":
                scale = source.scale(name)
                rounded = not torch.equal(snap_scale(scale, "fp16"), scale)
                if rounded:
                    found.append(Problem(name, *_SCALES, inexact=True))
                if not rounded or settings.allow_inexact:
                    problem = _values_problem(source, name, info, settings)
            if problem is not None:
                found.append(Problem(name, *problem))
        return found

    def write(self, source: Source, folder: Path, settings: Settings, progress: Callable[[str], None]) -> Written:
        import gguf

        options: Options = settings.options
        config = source.config
        writer = gguf.GGUFWriter(None, architectures.ARCHITECTURES[config.model_type].name)
        _write_general(writer, source)
        grids = source.grids()
        architectures.write_hyperparameters(writer, config, grids)
        written = Written(notes=architectures.notes(config, grids))
        if source.act_bits:
            written.notes.append(
                f"The model was trained with rounded activations ({' and '.join(map(str, source.act_bits))} bits). "
                "llama.cpp rounds activations to 8 bits, with a scale for every 32 or 256 of them."
            )
        if source.cache is not None:
            written.notes.append(
                f"The model was trained with a KV cache of {source.cache.describe()}. llama.cpp keeps floats, or, with "
                "--cache-type-k and --cache-type-v, blocks of 32 numbers (q8_0, q4_0), which are near to that."
            )
        written.notes += _write_vocabulary(writer, source, settings)
        with Spool(writer, folder) as spool:
            types = _write_layers(spool, source, settings, written, progress)
            _write_floats(spool, source, options, written)
            kinds = Counter(info.grid for info in grids.values())
            writer.add_array(GRID_KEY, grid_metadata(kinds.most_common(1)[0][0]))
            most = types.most_common(1)[0][0]
            writer.add_file_type(_FILE_TYPES[most])
            spool.write(folder / f"{_name(source)}-{most.upper()}.gguf")
        written.container = ", ".join(f"{name.upper()} ({count})" for name, count in types.most_common())
        return written


_SCALES = (
    "its scales are not exact in fp16, in which GGUF keeps scales",
    "train with `scale_dtype='auto'` or 'fp16', write floats with `type='f32'`, or let them be rounded with "
    "`allow_inexact=True`",
)


def layer_problem(info: LayerInfo, options: Options) -> tuple[str, str] | None:
    """Why a layer cannot be written, and what to do instead; None if it can, as far as shapes tell."""
    if options.type == "f32":
        return None
    if options.type == "auto":
        return None if _certain(info) else _no_type(info)
    reason = choice.fit(BLOCK_TYPES[options.type], info.grid, info.in_features).problem
    return None if reason is None else (reason, _instead(info))


def _values_problem(source: Source, name: str, info: LayerInfo, settings: Settings) -> tuple[str, str] | None:
    """The same where shapes do not tell: a type that was named holds some values of this grid, and not others, so the
    layer is read and packed, as writing it does."""
    if settings.options.type == "auto":
        return None
    kind = BLOCK_TYPES[settings.options.type]
    # an offset is up to 2^7 times the scale
    fits_fp16 = not kind.offset or float(source.scale(name).abs().max()) <= 2**8
    if fits_fp16 and choice.fit(kind, info.grid, info.in_features).certain:
        return None
    try:
        choice.to_blocks(_storable(source.layer(name), settings), kind)
    except NotExact as reason:
        return f"{kind.name.upper()} cannot hold it: {reason}", _instead(info)
    return None


def _certain(info: LayerInfo) -> list[BlockType]:
    """The types that hold a layer of this grid whatever its values, smallest first."""
    grid, columns = info.grid, info.in_features
    return [kind for kind in choice.candidates(grid, columns) if choice.fit(kind, grid, columns).certain]


def _instead(info: LayerInfo) -> str:
    """What to do about a type that does not hold a layer."""
    certain = _certain(info)
    if not certain:
        return _no_type(info)[1]
    return f"`type='auto'`: {certain[0].name.upper()} holds it in {certain[0].bits_per_weight:.4g} bits a weight"


def _no_type(info: LayerInfo) -> tuple[str, str]:
    grid, columns = info.grid, info.in_features
    if columns % 32:
        reason = f"{columns} input features do not divide into GGUF blocks of 32"
        return reason, "leave the layer out with `exclude_modules`, or write floats with `type='f32'`"
    if grid.group_size > 0 and grid.group_size % 32:
        usable = [str(g) for g in (32, 64, 128, 256) if columns % g == 0]
        reason = f"groups of {grid.group_size} do not divide into GGUF blocks of 32"
        return reason, f"train with group_size {', '.join(usable)} or -1, or write floats with `type='f32'`"
    reason = f"no GGUF type holds every level of the grid {grid.describe()}"
    return reason, "train a symmetric grid, or fewer bits, or write floats with `type='f32'`"


def _write_layers(
    spool: Spool, source: Source, settings: Settings, written: Written, progress: Callable[[str], None]
) -> Counter[str]:
    """The layers on a grid, one tensor of the file at a time. Returns how many are of each type."""
    types: Counter[str] = Counter()
    infos = source.grids()
    remarks: dict[str, str] = {}
    stored = tensors.matrices(infos, source.config)
    spool.writer.add_array(LAYERS_KEY, [name for name in stored if not name.endswith(tensors.ROUTERS)])
    for name, layers in stored.items():
        first, parts = infos[layers[0]], _Matrices(source, layers, settings)
        data: Iterable[torch.Tensor]
        if settings.options.type == "f32" or name.endswith(tensors.ROUTERS):
            written.dense += layers
            kind, data = "f32", (part.dequantize(torch.float32).view(torch.uint8) for part in parts)
        else:
            kind, blocks = _blocks(parts, settings, written)
            data = blocks
            written.layer_bytes += sum(part.numel() for part in blocks)
            written.weights += len(layers) * first.weights
            remarks.setdefault(kind, _remark(first, kind))
        shape = tensors.file_shape(name, first.out_features, first.in_features)
        spool.add(name, kind, shape if len(layers) == 1 else (len(layers), *shape), data)
        types[kind] += 1
        for layer in layers:
            progress(layer)
    written.notes += filter(None, remarks.values())
    return types


def _remark(info: LayerInfo, kind: str) -> str:
    """Why a narrow grid takes a wide type, if it does; else nothing."""
    grid, used = info.grid, BLOCK_TYPES[kind]
    anywhere = Grid(grid.bits, -1, grid.symmetric)
    holding = [k for k in choice.candidates(anywhere, 256) if choice.fit(k, anywhere, 256).certain]
    smaller = [k for k in holding if k.bits_per_weight < used.bits_per_weight]
    reasons = [(k, choice.fit(k, grid, info.in_features).problem) for k in smaller]
    reason = next(((k, problem) for k, problem in reasons if problem), None)
    if used.bits_per_weight < grid.code_bits + 1.5 or reason is None:
        return ""
    return (
        f"The grid {grid.describe()} takes {used.bits_per_weight:.4g} bits a weight as {kind.upper()}; "
        f"{reason[0].name.upper()} would take {reason[0].bits_per_weight:.4g}, but {reason[1]}."
    )


def _storable(tensor: GridTensor, settings: Settings) -> GridTensor:
    """The layer itself, or with its scales rounded to fp16 if that is allowed and needed."""
    if not settings.allow_inexact:
        return tensor
    snapped = snap_scale(tensor.scale, "fp16")
    return tensor if torch.equal(snapped, tensor.scale) else replace(tensor, scale=snapped)


@dataclass(frozen=True)
class _Matrices:
    """The layers that one tensor of the file holds, in the file's order of rows; each is read when it is asked for."""

    source: Source
    names: list[str]
    settings: Settings

    def __iter__(self) -> Iterator[GridTensor]:
        for name in self.names:
            yield _storable(self.trained(name), self.settings)

    def trained(self, name: str) -> GridTensor:
        return tensors.in_file_order(self.source.layer(name), self.source.config, name)


def _blocks(parts: _Matrices, settings: Settings, written: Written) -> tuple[str, list[torch.Tensor]]:
    """Type and bytes of a tensor; `problems` found nothing in the way."""
    for name in parts.names if settings.allow_inexact else ():
        trained = parts.trained(name)
        tensor = _storable(trained, settings)
        if tensor is not trained:
            written.loss = written.loss or Loss()
            written.loss.add(trained, tensor)
    wanted = settings.options.type
    try:
        if wanted == "auto":
            kind, data = choice.smallest(parts)
            return kind.name, data
        return wanted, [choice.to_blocks(part, BLOCK_TYPES[wanted]) for part in parts]
    except NotExact as reason:
        raise NotExact(
            f"{parts.names[0]} cannot be written exactly as {wanted!r}: {reason}. Leave the choice to `type='auto'`, "
            "or write floats with `type='f32'`."
        ) from reason


def _write_floats(spool: Spool, source: Source, options: Options, written: Written) -> None:
    """Everything else."""
    config = source.config
    experts: dict[str, dict[int, floats.StoredFloats]] = {}  # of tensors that are not whole yet
    count = architectures.experts(config)
    grids, left_out = source.grids(), []
    for name, weight in source.floats(grids):
        pieces = list(tensors.float_pieces(name, weight, config, grids))
        left_out += [] if pieces else [name]
        for place, piece in pieces:
            stored = floats.store(piece, tensors.float_type(place, piece, options.type, options.embedding_type))
            if place.expert is None:
                spool.add(place.tensor, stored.type, tuple(piece.shape), [stored.data])
            else:
                found = experts.setdefault(place.tensor, {})
                found[place.expert] = stored
                if len(found) == count:
                    data = [found[e].data for e in range(count)]
                    spool.add(place.tensor, stored.type, (count, *piece.shape), data)
                    del experts[place.tensor]
            if stored.error:
                written.notes.append(
                    f"{name} was never on a grid and is rounded to {stored.type.upper()}, as `embedding_type` asks: "
                    f"relative error of its weights {stored.error:.2e}"
                )
    if experts:
        name, found = next(iter(experts.items()))
        raise ValueError(f"The source has {len(found)} of {count} experts of {name!r}; GGUF holds all in one tensor.")
    if left_out:
        written.notes.append(
            f"{len(left_out)} tensors are left out, e.g. {left_out[0]}: they belong to layers after the "
            f"{config.num_hidden_layers} of the model (multi-token prediction), which are not run."
        )
    divisors = architectures.rope_divisors(config)
    if divisors is not None:
        spool.add("rope_freqs.weight", "f32", tuple(divisors.shape), [divisors.view(torch.uint8)])


def _write_general(writer: Any, source: Source) -> None:
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(_name(source))
    writer.add_quantized_by("peft-lrqat")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if source.recipe:
        writer.add_description(source.recipe)


def _write_vocabulary(writer: Any, source: Source, settings: Settings) -> list[str]:
    if not settings.options.vocabulary:
        writer.add_tokenizer_model("no_vocab")
        return ["The file has no tokenizer; it takes token ids only."]
    tokenizer = settings.tokenizer
    if tokenizer is None:
        raise ValueError(
            "A GGUF file holds the tokenizer, and there is none in the source's folder. Give `tokenizer=` (or "
            "`vocabulary=False` for a file that takes token ids only)."
        )
    if not hasattr(tokenizer, "get_vocab"):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    config = source.config
    return write_tokenizer(writer, tokenizer, config.vocab_size, _stops(source), settings.options.tokenizer_pre)


def _stops(source: Source) -> list[int]:
    """The tokens at which generation stops."""
    for config in (source.generation_config, source.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def _name(source: Source) -> str:
    """A name for the model: the last part of where it comes from."""
    return Path(source.origin).name or source.config.model_type


def grid_metadata(grid: Grid) -> list[float]:
    """The grid as three numbers."""
    return [float(grid.bits), float(grid.group_size), float(grid.symmetric)]
