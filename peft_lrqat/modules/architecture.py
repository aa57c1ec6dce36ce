"""What transformers does with an architecture's tensors between a model and its files.

transformers 5 loads many checkpoints under other names than they are stored with (Llava's `language_model.lm_head` is
`lm_head` in the model), cuts some tensors and joins others (the experts of a mixture), and goes back when it saves. A
file, and every engine but transformers, knows the names of the file; transformers compares those of the model with
config.json. Some models read weights while they are loaded, which a model that is still compressed does not have.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.quantizers import base as quantizers

from ..formats.source import Loading
from .experts import Experts, is_stacked, projections

# A tensor that every merged layer has, whatever else it is made of: its name tells how a quantized layer is renamed.
_PART = "weight_packed"


# -- names


def tensor_names(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, str | None]:
    """Name of each tensor -> what it is called in a file; None if it is cut or joined with others there.

    Args:
        tensors: names in the model -> tensors, which may be on the meta device.
    """
    if not isinstance(model, PreTrainedModel):
        return {name: name for name in tensors}
    marks = {name: tensor.to("meta") for name, tensor in tensors.items()}
    marks = {name: mark if mark is not tensors[name] else mark.detach() for name, mark in marks.items()}
    places = {id(mark): name for name, mark in revert_weight_conversion(model, dict(marks)).items()}
    return {name: places.get(id(mark)) for name, mark in marks.items()}


def module_names(model: nn.Module, quantized: Iterable[str]) -> dict[str, str | None]:
    """Name of each quantized module -> what it is called in a file; None if its codes are cut or joined there."""
    keys = {name: f"{name}.{_PART}" for name in quantized}
    called = tensor_names(model, {key: torch.empty(1, 1, device="meta") for key in keys.values()})
    return {name: (called[key] or "").removesuffix("." + _PART) or None for name, key in keys.items()}


def unwritable(model: nn.Module, layers: Iterable[str]) -> str:
    """A layer of which `save_pretrained` could not write what merging leaves, as transformers changes the values of its
    weight on the way to a file (an order of rows); "" if there is none.

    Args:
        layers: names of linear layers.
    """
    if not isinstance(model, PreTrainedModel):
        return ""
    names, parts = list(layers), {_PART: (2, 2), "weight_scale": (2, 1), "weight_shape": (2,)}

    def fails(some: list[str]) -> bool:
        held = {f"{n}.{part}": torch.empty(size, device="meta") for n in some for part, size in parts.items()}
        try:
            revert_weight_conversion(model, held)
        except Exception:  # whatever an operation on floats says of other shapes
            return True
        return False

    if not fails(names):
        return ""
    return next((name for name in names if fails([name])), "")


def float_names(model: nn.Module, modules: Mapping[str, nn.Module], quantized: Container[str]) -> list[str]:
    """Names, in files and, where it is another, in the model, of float modules that an engine may take for linear
    layers: whatever holds a matrix and is no embedding. (The router of a mixture is an nn.Linear for some.)

    Args:
        modules: all modules that count, by their names in the model.
        quantized: names of those that are not float.
    """
    weights = {}
    for name, module in modules.items():
        inner = getattr(module, "original_module", module)  # PEFT's wrapper of trained tokens
        weight = inner._parameters.get("weight")
        if name not in quantized and not isinstance(inner, nn.Embedding) and weight is not None and weight.ndim == 2:
            weights[f"{name}.weight"] = weight.detach()
    called = tensor_names(model, weights)
    both = [one for pair in called.items() for one in reversed(pair) if one is not None]
    return list(dict.fromkeys(name.removesuffix(".weight") for name in both))


def expert_parts(model: nn.Module, name: str, files: set[str] | None = None) -> dict[str, tuple[str, ...]] | None:
    """Projection -> what its rows are called in files, for one expert and in order (`gate_proj` and `up_proj`); None if
    files hold experts in another way than one by one, as rows.

    Args:
        name: of the module that holds the experts, as transformers does.
        files: gets the names of all their layers in files.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    found: dict[str, tuple[str, ...]] = {}
    module: Any = model.get_submodule(name)
    for projection in projections(module):
        experts, rows = min(2, module.num_experts), module.get_parameter(projection).shape[1]  # the others are alike
        # each row tells where it comes to lie; two columns, as transformers 5.17 drops dimensions of one
        numbers = torch.arange(experts * rows, device="cpu").view(experts, rows, 1).repeat(1, 1, 2)
        pieces: dict[int, list[tuple[int, str]]] = {}
        for file, piece in revert_weight_conversion(model, {f"{name}.{projection}": numbers}).items():
            part = re.fullmatch(r"(.*)\.(\d+)\.([^.]+)\.weight", file)
            first = int(piece.flatten()[0])
            there = torch.arange(first, first + len(piece), device="cpu").unsqueeze(1).repeat(1, 2)
            if part is None or int(part[2]) != first // rows or not torch.equal(piece, there):
                return None
            pieces.setdefault(int(part[2]), []).append((first % rows, part[3]))
            if files is not None:
                files.update(f"{part[1]}.{e}.{part[3]}" for e in range(module.num_experts))
        names = {tuple(part for _, part in sorted(of_expert)) for of_expert in pieces.values()}
        if len(pieces) != experts or len(names) != 1:
            return None
        found[projection] = names.pop()
    return found


def joined_weights(model: nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
    """Name of each single expert's layer, as merged models have it -> its weight (out, in), of experts that are joined
    in a model."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    stacked = [(name, module) for name, module in model.named_modules() if is_stacked(module)]
    # a model that was loaded from a quantized file knows the way from that file, and none back
    skeleton = skeleton_of(model) if stacked else None
    for name, module in stacked:
        if skeleton is None or (parts := expert_parts(skeleton, name)) is None:
            continue
        for projection, names in parts.items():
            stack = module.get_parameter(projection).detach()
            rows = stack.shape[1] // len(names)
            for expert in range(stack.shape[0]):
                for place, part in enumerate(names):
                    where = (expert, slice(place * rows, (place + 1) * rows))
                    found[f"{name}.{expert}.{part}"] = partial(stack.__getitem__, where)
    return found


def loaded_names(model: Any, stored: Iterable[str]) -> dict[str, str | None]:
    """Name of each tensor of a file -> what transformers calls it in the model; None if it is cut or joined."""
    if not isinstance(model, PreTrainedModel):
        return {name: name for name in stored}
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    known = dict(model.state_dict())  # as transformers looks into it for the prefix
    found: dict[str, str | None] = {}
    for name in stored:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if pattern is not None:  # joined, but not in a model that holds experts apart
            apart, _ = rename_source_key(name, renamings, [], model.base_model_prefix, known)
            renamed, pattern = (apart, None) if apart in known else (renamed, pattern)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        found[name] = renamed if pattern is None else None
    return found


#: What GPTQModel calls the parts of a projection of experts, whatever files of the architecture call them.
_DEFUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class OwnNames(NamedTuple):
    """How the names in a file become those that files of the architecture have.

    Attributes:
        tensors: name in the file -> the other, where they differ.
        modules: the other name of a module -> that in the file.
        renamings: for transformers, which loads such a file.
    """

    tensors: dict[str, str]
    modules: dict[str, str]
    renamings: list[WeightRenaming]


def own_names(model: Any, stored: Iterable[str]) -> OwnNames:
    """Recognize a mixture that GPTQModel has written (seen with Mixtral, 7.7): tensors are called as in transformers'
    model, not as in its files, and the parts of experts gate_proj, up_proj and down_proj.

    Args:
        model: without weights, its experts as transformers has them.
        stored: names of the tensors of the file.
    """
    names = dict.fromkeys(stored)
    places: dict[str, tuple[str, dict[str, str]]] = {}
    for name, module in model.named_modules() if isinstance(model, PreTrainedModel) else ():
        files: set[str] = set()
        if not is_stacked(module) or not (parts := expert_parts(model, name, files)):
            continue
        pairs = {key: (_DEFUSED.get(key, ()), of) for key, of in parts.items()}
        if pairs and all(len(new) == len(of) for new, of in pairs.values()):
            own = {new: part for both in pairs.values() for new, part in zip(*both, strict=True)}
            if any(new != part for new, part in own.items()):
                places[name] = (min(files).rsplit(".", 2)[0], own)
    found: dict[str, str] = {}
    for name in names:
        place, expert, part, rest = ["", "", "", *name.rsplit(".", 3)][-4:]
        if place in places and expert.isdigit() and part in places[place][1]:
            there, own = places[place]
            found[name] = f"{there}.{expert}.{own[part]}.{rest}"
    if not found:
        return OwnNames({}, {}, [])
    state = model.state_dict()
    others = tensor_names(model, {name: state[name] for name in names if name in state})
    found |= {name: file for name, file in others.items() if file is not None and file not in names}
    renamings = [
        WeightRenaming(rf"^{re.escape(name)}\.(\d+)\.{new}\.", rf"{there}.\1.{part}.")
        for name, (there, own) in places.items()
        for new, part in own.items()
    ]
    modules = {new.rpartition(".")[0]: name.rpartition(".")[0] for name, new in found.items()}
    return OwnNames(found, modules, renamings)


def joins_experts(conversion: Any) -> bool:
    """Whether one of transformers' conversions joins the experts of a file, or cuts them."""
    sources = getattr(conversion, "_original_source_patterns", ())
    return isinstance(conversion, WeightConverter) and any("experts" in source for source in sources)


def joining(conversion: Any, name: str) -> WeightConverter:
    """One of those conversions, for the experts of one module only.

    Args:
        name: of the module, in the model.
    """

    def within(pattern: str) -> str:
        return name + pattern[pattern.index("experts") + len("experts") :]

    sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
    return WeightConverter(list(map(within, sources)), list(map(within, targets)), list(conversion.operations))


def loaded_modules(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Name of each quantized module of a file -> what transformers calls it in the model: itself, if it is unknown."""
    names = list(stored)
    found = loaded_names(model, [f"{name}.weight" for name in names])
    return {name: (found[f"{name}.weight"] or f"{name}.weight").removesuffix(".weight") for name in names}


# -- loading


def expose_experts(model: Any, stored: Container[str]) -> list[str]:
    """Have layers for single experts in a model without weights, where a file has quantized ones.

    Args:
        stored: names of the quantized modules of the file.

    Returns:
        The names of the modules whose experts have layers now.

    Raises:
        ValueError: some layers of such experts are quantized, and others are not.
    """
    exposed = []
    for name, module in list(model.named_modules()):
        files: set[str] = set()
        if not is_stacked(module) or (parts := expert_parts(model, name, files)) is None:
            continue
        floats = sorted(file for file in files if file not in stored)
        if len(floats) == len(files):
            continue
        if floats:
            raise ValueError(
                f"The checkpoint holds {len(files) - len(floats)} of {len(files)} layers of the experts {name!r} "
                f"quantized, and others as floats, e.g. {floats[0]!r}. All or none of them can be read."
            )
        experts = Experts(module, parts)
        experts.take_apart()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, experts)
        exposed.append(name)
    return exposed


def skeleton_of(model: Any) -> Any:
    """The model that `model.config` describes, without weights; None if it cannot be made so, or there is none."""
    config: Any = copy.deepcopy(getattr(model, "config", None))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            return type(model)._from_config(config)
    except Exception:  # somebody else's class: whatever it may need
        return None


def loading(skeleton: Any, quantized: Iterable[str]) -> Loading:
    """What a checkpoint must say so that transformers loads it.

    Args:
        skeleton: a model without weights; it is spoiled. None: nothing is known.
        quantized: names of its quantized modules.
    """
    if not isinstance(skeleton, PreTrainedModel):
        return Loading()
    quantized = set(quantized)
    modules = dict(skeleton.named_modules())
    stacks = [name for name, module in modules.items() if name.endswith("experts") and _stacked(module)]
    floats = [name for name in stacks if not any(layer.startswith(name + ".") for layer in quantized)]
    packed = len(floats) < len(stacks) or any(isinstance(module, Experts) for module in modules.values())
    joins, cuts, others = False, "", False
    for conversion in get_model_conversion_mapping(skeleton, add_legacy=False):
        sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
        if isinstance(conversion, WeightConverter) and all(source.endswith(".weight") for source in sources):
            joins = joins or (bool(floats) and joins_experts(conversion))
            others = others or not joins_experts(conversion)
            if len(targets) > 1:
                cuts = sources[0]
    joined = _joined_floats(skeleton, {*quantized, *stacks}) if others else ""
    replaced = next((type(module).__name__ for module in modules.values() if type(module).__name__ in _REPLACED), "")
    early = _other_entries(skeleton) or _reads_weights(skeleton, quantized)
    return Loading(early, joins or bool(joined), cuts, bool(floats), packed, joined, replaced)


# Classes of modules that transformers replaces in every checkpoint of compressed-tensors, by others with other tensors.
_REPLACED = {
    name
    for name, patch in getattr(quantizers, "MODULES_TO_PATCH_FOR_QUANTIZATION", {}).items()
    if "compressed-tensors" in map(str, (getattr(m, "value", m) for m in patch["quantization_methods"]))
}


def _joined_floats(skeleton: Any, others: Container[str]) -> str:
    """A float tensor, of none of these modules, that files hold cut or joined; "" if there is none."""
    state = skeleton.state_dict()
    named = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in others}
    named = {name: tensor for name, tensor in named.items() if not re.search(r"\.experts\.\d+\.", name)}
    return next((name for name, file in tensor_names(skeleton, named).items() if file is None), "")


def _stacked(module: nn.Module) -> bool:
    return any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))


def _other_entries(model: Any) -> bool:
    """Whether a model is used by other ways than its `forward`, whose first call unpacks a compressed model."""
    features = any(hasattr(model, f"get_{what}_features") for what in ("text", "image", "video", "audio"))
    return features or bool(getattr(model.config, "is_encoder_decoder", False))  # `generate` runs the encoder first


def _reads_weights(model: Any, quantized: set[str]) -> bool:
    """Whether initializing a model, which transformers does while loading, reads the weight of a quantized layer."""
    for name, module in model.named_modules():
        if name in quantized:
            module._parameters.pop("weight", None)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True  # as what was loaded: transformers' functions leave it alone

    def read(module: nn.Module, owner: Any) -> bool:
        inner = (read(child, child if isinstance(child, PreTrainedModel) else owner) for child in module.children())
        if any(inner):
            return True
        try:
            owner._init_weights(module)
        except AttributeError as error:
            return "no attribute 'weight'" in str(error)
        except Exception:  # what else does not work on the meta device says nothing
            return False
        return False

    with torch.device("meta"), torch.no_grad():
        return read(model, model)
