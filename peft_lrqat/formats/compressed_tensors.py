"""compressed-tensors: "pack-quantized" (2 to 8 bits) and "int-quantized" (W8A8).

Both may have activations on a grid, whose scales are found anew for every token; the second may have fixed ones. Which
of them is written: `multiplies_int8`.

    weight_packed        int32 (out, words), codes packed along the inputs (`packing.py`); or
    weight               int8 (out, in), the codes themselves
    weight_scale         (out, groups), the model's dtype, weight units per grid step
    weight_zero_point    int32 (words, groups), packed along the outputs; or int8 (out, groups); asymmetric grids only
    weight_shape         int64 (2,), (out, in)
    weight_g_idx         int32 (in,), the group of an input; all -1 where there is no order
    input_scale          (1,), the model's dtype, the fixed scale of the layer's input; "int-quantized" only

    W = scale * (code - zero point),    both centred

A merged module (`modules/packed.py`, `modules/rounded_input.py`) holds the same tensors, so `export` and
`save_pretrained` of a merged model write the same file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..grid import PER_CHANNEL, PER_TENSOR, Grid, GridTensor, dequantize, quantize
from ..ops.activations import PER_TOKEN, Activations
from ..ops.kv_cache import CacheRounding
from ..packing import pack, unpack, words_per_row
from .safetensors import (
    Plan,
    SafetensorsWriter,
    container,
    container_problems,
    no_linear,
    round_scale,
    scale_problems,
)
from .scheme import Describe, Scheme, Tensors, int32, pattern_matches
from .source import LayerInfo, Loading, Source
from .usage import how_to_load
from .writer import Loss, Problem, Settings

NAME = "compressed-tensors"
PARTS = frozenset(
    {"weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale"}
)
SCALE = "weight_scale"

WIDTHS = (2, 3, 4, 5, 6, 7, 8)

# `Scheme.variant`: which versions of compressed-tensors wrote the file, if it says so. In old files, no code of odd
# width straddles two words.
_OLD, _NEW = "before 0.18", "0.18 or later"

#: Where a group names the rule by which inputs are rounded, if it is not compressed-tensors' own: among the settings of
#: an observer, which dynamic activations do not have.
_RULE = "peft_lrqat_rule"


# -- a layer's tensors


def packed_tensors(weight: GridTensor, bits: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a "pack-quantized" file holds for a layer.

    Args:
        weight: (out, in).
        bits: container width.
        dtype: of the scales, which it holds exactly. A per-tensor scale is repeated per channel: engines have kernels
            for that.
    """
    rows, columns = weight.codes.shape
    tensors = {
        "weight_packed": pack(weight.codes, bits),
        "weight_scale": weight.scale.expand(rows, -1).to(dtype).contiguous(),
        "weight_shape": torch.tensor([rows, columns], device=weight.codes.device),
    }
    if weight.zero_point is not None:
        per_row = weight.zero_point.expand(rows, -1)
        tensors["weight_zero_point"] = pack(per_row.t().contiguous(), bits).t().contiguous()
    return tensors


def integer_tensors(weight: GridTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What an "int-quantized" file holds for a layer: symmetric, scales (out, 1) or (1, 1) that `dtype` holds."""
    rows = weight.codes.shape[0]
    tensors = {"weight": weight.codes, "weight_scale": weight.scale.expand(rows, 1).to(dtype).contiguous()}
    return tensors if weight.input_scale is None else {**tensors, "input_scale": weight.input_scale.to(dtype)}


def unpack_zero_point(packed: torch.Tensor, bits: int, out_features: int, packing: str = _NEW) -> torch.Tensor:
    """int8 (out, groups) of a packed `weight_zero_point`; `packing`: see `scheme_of`."""
    return _unpack_rows(packed.t().contiguous(), bits, out_features, packing).t().contiguous()


# -- config.json


#: How a layer is stored: its grid, the width of its codes, and how its input is rounded, or None.
Stored = tuple[Grid, int, Activations | None]


def multiplies_int8(grid: Grid, bits: int, activations: Activations | None) -> bool:
    """Whether a layer is stored as int8, which engines multiply with int8 activations (W8A8); else it is packed."""
    by_row = grid.group_size <= 0 and grid.symmetric
    by_token = activations is not None and (activations.bits, activations.group_size) == (8, PER_TOKEN)
    return bits == 8 and by_row and by_token


def quantization_config(
    float_linears: list[str],
    layers: dict[str, Stored],
    loading: Loading | None = None,
    cache: CacheRounding | None = None,
) -> dict[str, Any]:
    """config.json's `quantization_config`.

    Where a module has one name in the file and another in the model, both are listed: transformers looks for the
    second, other engines for the first.

    Args:
        float_linears: names of the linear layers that are not quantized; they are listed under "ignore".
        layers: module name -> how it is stored, for every quantized module. Those that are alike make a group; a
            single group names all linear layers instead of each.
        loading: what transformers does with the architecture.
        cache: how the model rounds its KV cache, or None.
    """
    loading = loading or Loading()
    alike: dict[Stored, list[str]] = {}
    for name, stored in layers.items():
        alike.setdefault(stored, []).append(name)
    targets = [["Linear"]] if len(alike) == 1 else list(alike.values())
    groups = [_group(names, *stored) for names, stored in zip(targets, alike, strict=True)]
    formats = {group["format"] for group in groups}
    config: dict[str, Any] = {
        "quant_method": NAME,
        "version": "0.18.0",  # the first that packs odd widths as `packing.py` does
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": [*float_linears, *([_EXPERTS] if loading.experts else [])],
        "kv_cache_scheme": _cache_scheme(cache),
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    }
    if _dequantizes(alike, loading):
        config["dequantize"] = True
    if loading.joins and not loading.packed_experts:
        config["config_groups"]["floats_to_join"] = _FLOATS_TO_JOIN
    return config


#: How config.json names the experts of a mixture, which are one tensor in the model and modules in the file.
_EXPERTS = r"re:.*\.experts\..*"

# transformers 5.23 takes whatever it joins while loading for quantized experts, drops tensors that are not, and fails.
# How they are quantized, it reads from the group whose patterns speak of "experts"; those of 8-bit floats without
# scales it leaves as they are. This one says so, of modules that no model has.
_FLOATS_TO_JOIN = {
    "targets": ["re:^no module: float experts stay as they are$"],
    "format": "float-quantized",
    "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
    "input_activations": None,
    "output_activations": None,
}


def _cache_scheme(cache: CacheRounding | None) -> dict[str, Any] | None:
    """The entry by which transformers rounds keys and values, (batch, heads, tokens, head size): "group" with a head's
    size is one scale per token and head. ("token" is one scale of a head for all tokens of a call.)

    vLLM 0.32 refuses it: it takes 8-bit floats with fixed scales only. So a rule of vLLM's own has no entry.
    """
    if cache is None or cache.rule != "transformers":
        return None
    return {**_CACHE, "num_bits": cache.bits, "group_size": cache.group_size}


_CACHE = {"type": "int", "symmetric": True, "strategy": "group", "dynamic": True}


def cache_rounding(quantization: Mapping[str, Any]) -> CacheRounding | None:
    """How a `quantization_config` has keys and values rounded, or None.

    Raises:
        ValueError: in another way than per token and head, with scales of their own.
    """
    scheme = quantization.get("kv_cache_scheme")
    if not scheme:
        return None
    try:
        if any(scheme.get(key, value) != value for key, value in _CACHE.items()):
            raise ValueError("it must be integers in symmetric groups with dynamic scales")
        return CacheRounding(scheme["num_bits"], "transformers", scheme["group_size"])
    except (KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"The checkpoint has a quantized key-value cache (`kv_cache_scheme` in config.json: {scheme}) of a kind "
            f"that this package does not train ({error}): the model would not be the one that was loaded. Start from a "
            "checkpoint without, or from the float model."
        ) from error


def _group(targets: list[str], grid: Grid, bits: int, activations: Activations | None) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": "int-quantized" if multiplies_int8(grid, bits, activations) else "pack-quantized",
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": grid.symmetric,
            # a per-tensor scale is stored once per channel, see `packed_tensors`
            "strategy": "group" if grid.group_size > 0 else "channel",
            "group_size": grid.group_size if grid.group_size > 0 else None,
            "dynamic": False,
        },
        "input_activations": None if activations is None else _input_activations(activations),
        "output_activations": None,
    }


#: What all activations that are rounded have in common.
_INTEGERS = {"type": "int", "symmetric": True}


def _input_activations(activations: Activations) -> dict[str, Any]:
    said = {"num_bits": activations.bits, **_INTEGERS, "dynamic": not activations.static}
    if activations.static:
        return {**said, "strategy": "tensor"}
    by_token = activations.group_size == PER_TOKEN
    said |= {"strategy": "token"} if by_token else {"strategy": "group", "group_size": activations.group_size}
    return said if activations.rule == NAME else {**said, "observer_kwargs": {_RULE: activations.rule}}


def _read_activations(inputs: dict[str, Any]) -> Activations | None:
    """What `_input_activations` says, or None if inputs are rounded in another way."""
    strategy, dynamic, bits = (inputs.get(key) for key in ("strategy", "dynamic", "num_bits"))
    static = (strategy, dynamic, bits) == ("tensor", False, 8)
    size = PER_TOKEN if static or strategy == "token" else inputs.get("group_size") if strategy == "group" else None
    if any(inputs.get(key) != value for key, value in _INTEGERS.items()) or (dynamic is not True and not static):
        return None
    if bits not in (4, 8) or not isinstance(size, int) or (size <= 0 and size != PER_TOKEN):
        return None
    return Activations((inputs.get("observer_kwargs") or {}).get(_RULE, NAME), bits, size, static)


def _dequantizes(layers: Iterable[Stored], loading: Loading) -> bool:
    """Whether transformers must decompress while it loads. It takes the choice from config.json; vLLM ignores the key.

    Otherwise it keeps the model compressed until the first forward. There it sizes packed zero points wrongly (its
    "weight_zero_point" has one row per output channel, and loading fails; seen with transformers 5.23 and
    compressed-tensors 0.20), and has no weight for those who read one before that forward.
    """
    return loading.early or not all(grid.symmetric for grid, _, _ in layers)


def stored_problem(
    quantization: dict[str, Any], layers: Iterable[Stored], loading: Loading, cache: CacheRounding | None = None
) -> str:
    """Why transformers cannot load a checkpoint with this `quantization_config`, or nothing; see `loading_problem`."""
    kinds = set(layers)
    if problem := loading_problem(kinds, loading, cache):
        return problem
    if _dequantizes(kinds, loading) and not quantization.get("dequantize"):
        lacks = "`dequantize`: true"
    elif loading.joins and not _speaks_of_experts(quantization):
        lacks = "a group for the experts"
    else:
        return ""
    return f"quantization_config in config.json lacks {lacks}; export it anew, which adds it"


def _speaks_of_experts(quantization: dict[str, Any]) -> bool:
    targets = [target for group in quantization["config_groups"].values() for target in group["targets"]]
    return any(target.startswith("re:") and "experts" in target for target in targets)


def loading_problem(layers: Iterable[Stored], loading: Loading, cache: CacheRounding | None = None) -> str:
    """Why transformers cannot load a checkpoint of layers that are stored so, or nothing."""
    kinds = set(layers)
    if loading.cuts:
        return (
            f"while loading, transformers cuts the tensor {loading.cuts!r} of this architecture, which it cannot do in "
            "a checkpoint of compressed-tensors (seen with 5.23)"
        )
    if loading.replaced:
        return (
            f"in checkpoints of compressed-tensors transformers looks for the tensors of {loading.replaced} under "
            "other names, and leaves these modules random where it finds none (seen with 5.23)"
        )
    if loading.packed_experts and loading.experts:
        return "transformers takes the experts of all layers for quantized, or of none (seen with 5.23)"
    if loading.packed_experts and loading.joined:
        return (
            f"transformers takes whatever it joins for quantized, or nothing: the experts are, and {loading.joined!r} "
            "is not (seen with 5.23)"
        )
    if loading.packed_experts and not all(grid.symmetric for grid, _, _ in kinds):
        return "transformers reads no zero points of experts (seen with 5.23)"
    if not _dequantizes(kinds, loading):
        return ""
    why = "reads weights of this architecture before the first forward" if loading.early else "reads zero points"
    then = f"transformers {why}, so it decompresses the model while loading, and then"
    if any(activations is not None for _, _, activations in kinds):
        return f"{then} rounds no activations"
    if cache is not None and cache.rule == "transformers":
        return f"{then} rounds no KV cache"
    return f"{then} knows one grid for all layers" if len(kinds) > 1 else ""


# -- reading


def schemes(quantization: dict[str, Any], metadata: Mapping[str, str]) -> Describe:
    """See `reading.py`."""
    for part, what in (
        ("transform_config", "transforms (rotations) of the activations"),
        ("sparsity_config", "sparse weights"),
    ):
        value = quantization.get(part)
        if value and not (part == "sparsity_config" and value.get("format") == "dense"):
            raise ValueError(
                f"The checkpoint has {what} (`{part}` in config.json), which this package does not train: the model "
                "would not be the one that was loaded. Start from a checkpoint without, or from the float model."
            )
    version = re.match(r"(\d+)\.(\d+)", str(quantization.get("version")))
    packing = "" if version is None else _OLD if (int(version[1]), int(version[2])) < (0, 18) else _NEW
    groups = [
        (group.get("targets") or [], scheme_of(label, group, quantization.get("format"), packing))
        for label, group in (quantization.get("config_groups") or {}).items()
        if group.get("targets") != _FLOATS_TO_JOIN["targets"]
    ]

    # compressed-tensors' order: names, then patterns, then classes of modules; each of them alphabetically
    by_target = sorted(
        ((target, scheme) for targets, scheme in groups for target in targets),
        key=lambda pair: (pair[0] == "Linear", "re:" in pair[0], pair[0]),
    )

    def layer(*names: str) -> Scheme:
        for target, scheme in by_target:
            if target == "Linear" or any(matches(target, name) for name in names):
                return scheme
        raise ValueError(
            f"Layer {names[0]!r} is stored quantized, but no entry of `config_groups` in config.json names it."
        )

    return layer


def matches(target: str, name: str) -> bool:
    """Whether an entry of "targets" or "ignore" names a module."""
    return pattern_matches(target[3:], name) if target.startswith("re:") else target == name


def scheme_of(label: str, group: dict[str, Any], fallback: str | None, packing: str = _NEW) -> Scheme:
    """How an entry of `config_groups` stores its layers.

    Args:
        label: what the entry is, for messages.
        fallback: the format where the entry names none.
        packing: of codes of odd width; "" where the file does not say which version wrote it.

    Raises:
        ValueError: it is not integers per group, channel or tensor, or rounds activations otherwise than to 8 or 4
            bits, dynamically, per token or group.
    """
    weights, form = group.get("weights") or {}, str(group.get("format") or fallback)
    strategies: dict[Any, Any] = {"group": weights.get("group_size"), "channel": PER_CHANNEL, "tensor": PER_TENSOR}
    known = form in ("pack-quantized", "int-quantized", "naive-quantized")
    if not known or weights.get("type", "int") != "int" or weights.get("strategy") not in strategies:
        raise ValueError(
            f"{label} of the checkpoint has format {form!r} with weights {weights}. Integer weights of 2 to 8 bits per "
            'group, channel or tensor can be read ("pack-quantized", "int-quantized").'
        )
    group_size, symmetric = strategies[weights["strategy"]], weights.get("symmetric", True)
    inputs, activations = group.get("input_activations"), None
    if inputs or group.get("output_activations"):
        activations = _read_activations(inputs or {})
        if activations is None or not symmetric or group.get("output_activations"):
            raise ValueError(
                f"{label} of the checkpoint quantizes activations as well as weights, as {inputs} (and outputs as "
                f"{group.get('output_activations')}). Of those, 8 or 4 bits, symmetric and dynamic, per token or "
                "group, and 8 bits, symmetric, with one fixed scale, beside symmetric weights can be read. Start from "
                "a weight-only checkpoint or from the float model; `act_bits`, of either configuration, trains with "
                "activations on such a grid."
            )
    return Scheme(NAME, weights.get("num_bits", 8), group_size, symmetric, packing, activations)


def shape(scheme: Scheme, sizes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
    """See `reading.py`."""
    if "weight_packed" in sizes:
        rows, columns = read("weight_shape").tolist()
    else:
        rows, columns = sizes["weight"]
    return rows, columns


def read_scales(
    scheme: Scheme, tensors: Tensors, out_features: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `reading.py`."""
    if "weight_packed" in tensors and tensors["weight_shape"].tolist() != [out_features, in_features]:
        raise RuntimeError(f"`weight_shape` is {tensors['weight_shape'].tolist()}")
    scale, zero_point = _by_row(tensors["weight_scale"], scheme), tensors.get("weight_zero_point")
    if not scheme.symmetric and zero_point is None:
        raise KeyError("weight_zero_point")
    if zero_point is not None:
        if zero_point.dtype == torch.int32 and "weight_packed" in tensors:
            zero_point = unpack_zero_point(zero_point, scheme.bits, out_features, scheme.variant)
        zero_point = _by_row(zero_point, scheme)
    return scale, zero_point


def _by_row(stored: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """(rows, groups) of scales or zero points, which may lack the second dimension where a row has one."""
    if scheme.group_size == PER_TENSOR and stored.numel() == 1:
        return stored.reshape(1, 1)
    return stored.unsqueeze(1) if stored.dim() == 1 else stored


def read_codes(scheme: Scheme, tensors: Tensors, out_features: int, in_features: int) -> torch.Tensor:
    """See `reading.py`. A float `weight` is one that transformers has decompressed in memory: its codes follow from it,
    and are checked."""
    if "weight_packed" in tensors:
        return _unpack_rows(tensors["weight_packed"], scheme.bits, in_features, scheme.variant)
    weight = tensors["weight"]
    if not weight.is_floating_point():
        if weight.dtype != torch.int8:
            raise RuntimeError(f"`weight` is {weight.dtype}, not int8")
        return weight
    scale, zero_point = read_scales(scheme, tensors, out_features, in_features)
    scale, zero_point = scale.float(), None if zero_point is None else zero_point.to(torch.int8)
    codes = quantize(weight, scale, zero_point, Grid(scheme.bits, PER_CHANNEL, zero_point is None))
    if not torch.equal(dequantize(codes, scale, zero_point, weight.dtype), weight):
        raise RuntimeError("the weight was changed after it was loaded, and does not lie on its grid any more")
    return codes


def _unpack_rows(packed: torch.Tensor, bits: int, columns: int, packing: str) -> torch.Tensor:
    """Centred codes of packed rows; the old packing is known by its number of words, or else by its version."""
    int32(packed, "weight_packed")
    per_word = 32 // bits
    dense, old = packed.shape[1] == words_per_row(columns, bits), packed.shape[1] == -(-columns // per_word)
    if dense and old and 32 % bits and not packing:
        # codes of the new packing reach into the bits that the old one leaves at zero
        if not bool((packed & (-1 << (per_word * bits))).any()):
            raise RuntimeError(
                f"{columns} codes of {bits} bits take as many words in the packing of compressed-tensors before 0.18 "
                "as later, and nothing tells which this is; set `version` in quantization_config"
            )
        old = False
    if dense and not (old and packing == _OLD):
        return unpack(packed, bits, columns)
    if not old:
        raise RuntimeError(f"{packed.shape[1]} words a row do not hold {columns} codes of {bits} bits")
    shifts = torch.arange(per_word, device=packed.device, dtype=torch.int32) * bits
    unsigned = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return (unsigned.flatten(1)[:, :columns] - (1 << (bits - 1))).to(torch.int8)


# -- writing


class CompressedTensorsWriter(SafetensorsWriter):
    """Writes the format. Layers may lie on different grids."""

    name = NAME
    usage = how_to_load('"compressed-tensors>=0.18"')
    in_vllm = True

    def problems(self, source: Source, settings: Settings) -> list[Problem]:
        packed, found = self.packed(source), no_linear(source, NAME)
        found += scale_problems(source, {name: info.dtype for name, info in packed.items()})
        found += container_problems(packed, settings, WIDTHS, NAME)
        stored = {name: _stored(info, settings) for name, info in packed.items()}
        for trained, by in dict.fromkeys((info.activations, stored[name][2]) for name, info in packed.items()):
            if trained is not None and by is not None and trained != by:
                reason = (
                    f"activations were trained by the rule {trained.rule!r} ({trained.describe()}), and engines round "
                    f"them by {by.rule!r} where the layers are stored so ({by.describe()})"
                )
                hint = "use the format and the container that it was trained for, or allow_inexact=True"
                found.append(Problem(None, reason, hint, inexact=True))
        for name, (grid, bits, activations) in stored.items():
            if activations is not None and activations.static and not multiplies_int8(grid, bits, activations):
                why = "engines take fixed scales of activations beside int8 codes per channel only"
                found.append(Problem(name, why, "leave container_bits out, or use 8"))
            if activations is not None and not grid.symmetric:
                why = "transformers decompresses a model with zero points while loading, and then rounds no activations"
                found.append(Problem(name, why, "train with symmetric=True"))
        return found

    def plan(self, source: Source, settings: Settings) -> Plan:
        layers = {name: _stored(info, settings) for name, info in self.packed(source).items()}
        also = {source.modules[name]: stored for name, stored in layers.items() if name in source.modules}
        described = quantization_config(source.float_linears, {**layers, **also}, source.loading, source.cache)
        widths = sorted({bits for _, bits, _ in layers.values()})
        return Plan(described, f"{described['format']}, {' and '.join(map(str, widths))} bits", layers)

    def stored(self, name: str, weight: GridTensor, info: LayerInfo, settings: Settings, loss: Loss) -> GridTensor:
        return round_scale(name, weight, info.dtype, settings, loss)

    def tensors(self, name: str, weight: GridTensor, info: LayerInfo, plan: Plan) -> dict[str, torch.Tensor]:
        grid, bits, activations = plan.details[name]
        if multiplies_int8(grid, bits, activations):
            return integer_tensors(weight, info.dtype)
        return packed_tensors(weight, bits, info.dtype)


def _stored(info: LayerInfo, settings: Settings) -> Stored:
    """How a layer will be stored: with the rule by which engines round its inputs then, if they are rounded."""
    bits, activations = container(info, settings, WIDTHS), info.activations
    if activations is not None:
        activations = replace(activations, rule=engine_rule(activations, info.grid, bits))
    return info.grid, bits, activations


def engine_rule(activations: Activations, grid: Grid, bits: int) -> str:
    """The rule that rounds the inputs of a layer stored so: transformers', or the one of vLLM's kernels for it."""
    if activations.rule not in ("vllm", "humming"):
        return NAME
    return "vllm" if multiplies_int8(grid, bits, activations) else "humming"
