"""What an adapter's file may hold: checked before the model is changed, and again before anything is copied into it.

The first look is at a local safetensors file, the second at whatever becomes of a file: PEFT renames tensors,
transformers and Trainer load into adapters that exist, and older files are pickles.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from peft import PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...modules.experts import ExpertStack
from ...modules.packed import QuantizedLinear
from .config import GridConfig
from .fingerprint import check_checksum, fingerprint, in_order, of_tensor, version_of
from .frozen import FrozenWeight
from .layer import MergingLayer
from .packed_parameter import is_rewritten, take_note
from .unfilled import check_saved_values

#: How a PeftModel's files name the model.
PREFIX = "base_model.model."
#: How they name, after the method's prefix, the checksum of the base.
CHECKSUM = "base_checksum"


class Content(NamedTuple):
    """What a tensor of an adapter's file must be."""

    says: str
    dtypes: tuple[torch.dtype, ...]
    holds: Callable[[torch.Tensor], bool] = lambda values: True


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

FACTOR = Content("finite numbers", _FLOATS, lambda values: bool(values.isfinite().all()))
SCALE = Content(
    "finite numbers, none of them 0", (torch.float32,), lambda values: bool((values.isfinite() & (values != 0)).all())
)
CODES = Content("packed codes", (torch.int32,))
STREAM = Content("a key and a count", (torch.int64,), lambda values: values.numel() == 2 and int(values[1]) >= 0)


def check_adapter_file(targets: dict[str, Any], config: Any) -> None:
    """Raise ValueError if the adapter file that `config` was loaded with does not fit the model's modules."""
    shapes = config._adapter_shapes
    if shapes is None:
        return
    widths = {}
    for name, module in targets.items():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module  # LoraLayer has these; its base class does not declare them
            in_features, out_features = layer.in_features, layer.out_features
        elif isinstance(module, QuantizedLinear | ExpertStack | FrozenWeight):
            in_features, out_features = module.in_features, module.out_features // getattr(module, "experts", 1)
        else:
            out_features, in_features = module.weight.shape
            if isinstance(module, Conv1D):
                out_features, in_features = in_features, out_features
        widths[name], experts = in_features, getattr(module, "experts", 1)
        expected = config.expected_shapes(name, out_features, in_features, experts)
        keys = {f"{PREFIX}{name}.{part}": shape for part, shape in expected.items()}
        absent = keys.keys() - shapes.keys()
        # not where something else of the module may become it, by PEFT's `key_mapping`
        if absent and len(absent) < len(keys) and not _has_others(shapes, f"{PREFIX}{name}.", keys):
            raise ValueError(
                f"The adapter file has a part of module {name!r}, but not {min(absent)!r}, so it would not be what was "
                "trained. The file is damaged, or adapter_config.json is another adapter's: take another copy of both. "
                "Nothing was loaded."
            )
        for key, shape in keys.items():
            saved = shapes.get(key)
            if saved is None:
                continue  # PEFT warns about what is absent, and its `key_mapping` may rename it
            if saved != shape:
                raise ValueError(
                    f"In the adapter file {key!r} has shape {saved}, but this model needs {shape}. The adapter was "
                    "made for another architecture, rank or group size: load it on the model, with the configuration, "
                    "that it was trained on."
                )
    config.check_values(widths)
    with safe_open(config._adapter_path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  # it is no dictionary
            content = content_of(key, config)
            if content is CODES:  # any code is one: it is enough to look at the dtype
                check_tensor(key, file.get_slice(key)[:0], content)
            elif content is not None:
                check_tensor(key, file.get_tensor(key), content)


def check_savable(model: Any, adapters: list[str], options: dict[str, Any]) -> None:
    """Raise ValueError if adapters of this package could not be saved.

    Args:
        model: a PeftModel.
        adapters: their names; PEFT refuses those that there are not.
        options: of `save_pretrained`; with `state_dict`, the values to save are not the model's.
    """
    for name in adapters:
        if isinstance(model.peft_config.get(name), GridConfig):
            if (path := options.get("path_initial_model_for_weight_conversion")) is not None:
                raise ValueError(
                    f"`path_initial_model_for_weight_conversion` is {path!r}: PEFT would write the difference of two "
                    f"adapters as one of LoRA, but adapter {name!r} acts inside the rounding, where it is none. Leave "
                    "the option out: the file holds the adapter as it was trained."
                )
            layers = layers_to_save(name, model)
            if options.get("state_dict") is None:
                check_saved_values(name, layers)


def check_method_of_file(config: Any, state_dict: dict[str, Any]) -> None:
    """Raise ValueError if tensors are those of an adapter's file of this package, and `config` is of another method,
    such as LoRA, to which they would mean something else.
    """
    if isinstance(config, GridConfig):
        return
    ours = [key for key in state_dict if key.split(".")[-1].endswith(f"_{CHECKSUM}")]
    if ours:
        raise ValueError(
            f"The tensors are those of an adapter of peft-lrqat (they have {ours[0]!r}), which belong inside the "
            f"rounding, but the configuration is a {type(config).__name__}. Load the adapter with its own, on a fresh "
            "copy of its base: leave `config` out of `PeftModel.from_pretrained`."
        )


def layers_to_save(adapter: str, model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer with an adapter; ValueError if there is none."""
    if layers := {name: model.get_submodule(name) for name in layers_with(adapter, model)}:
        return layers
    raise ValueError(
        f"Adapter {adapter!r} cannot be saved: the model has no layer of it any more, since `merge_and_unload()` or "
        "`unload()`. Save adapters before; what these return is saved by its own `save_pretrained`."
    )


def adapters_of(module: nn.Module) -> dict[str, Any]:
    """Adapter -> its configuration, of a module that may be a layer."""
    return module.adapter_options if isinstance(module, MergingLayer) else {}


def layers_with(adapter: str, model: nn.Module) -> set[str]:
    """The names of the layers that an adapter has."""
    return {name for name, module in model.named_modules() if adapter in adapters_of(module)}


def check_options_of_file(model: Any, folder: str, adapter: str) -> None:
    """Look at the options of a file that is loaded into an adapter which the model has, as a Trainer does to resume:
    PEFT takes the tensors, and keeps the options of the model.

    Args:
        model: a PeftModel.
        folder: the file's; one that is not here is not looked at.

    Raises:
        ValueError: the file is of another method.
    """
    config = model.peft_config.get(adapter)
    path = os.path.join(folder, CONFIG_NAME)
    if not isinstance(config, GridConfig) or not os.path.isfile(path):
        return
    with open(path, encoding="utf-8") as file:
        kind, here = json.load(file).get("peft_type"), PeftType(config.peft_type).value
    if kind != here:
        raise ValueError(
            f"{folder!r} is an adapter of the method {kind}, and adapter {adapter!r} of the model one of {here}, in "
            "which its tensors mean something else. Load it on a fresh copy of its base."
        )
    saved: Any = type(config).from_pretrained(folder)
    saved.forget_unmatched({name for name, layer in model.named_modules() if isinstance(layer, MergingLayer)})
    said = [
        f"{name}={getattr(saved, name)!r} (here {getattr(config, name)!r})"
        for name in config.meaning
        if getattr(saved, name) != getattr(config, name)
    ]
    if said:
        warnings.warn(
            f"The adapter in {folder!r} was trained with {', '.join(said)}. It is loaded into adapter {adapter!r}, "
            "which keeps its own options, and does not compute what was trained. To go on where that stopped, make the "
            "model with the options of the file.",
            stacklevel=3,
        )


def _has_others(found: Collection[str], module: str, known: Collection[str]) -> bool:
    return any(key.startswith(module) and key not in known for key in found)


def content_of(key: str, config: Any) -> Content | None:
    """What the tensor of this name in a file, without an adapter's name, must be; None: it is not the method's."""
    return next((content for part, content in config.contents.items() if part in key.split(".")), None)


def check_tensor(key: str, values: torch.Tensor, content: Content) -> None:
    """Raise ValueError if a tensor of an adapter's file is not what it must be."""
    if values.is_meta:
        return
    values = values.to_local() if hasattr(values, "to_local") else values
    if values.dtype not in content.dtypes or not content.holds(values):
        raise ValueError(
            f"In the adapter file {key!r} must hold {content.says} ({', '.join(map(str, content.dtypes))}), but it "
            f"holds {_found(values)}. The file is damaged, or training had failed when it was written: take an earlier "
            "checkpoint. Nothing was loaded."
        )


def check_state_dict(
    model: nn.Module, config: Any, adapter: str, prefix: str, state_dict: dict[str, Any], whole: bool
) -> None:
    """Raise ValueError if tensors cannot be an adapter's, before any is copied; warn of those that belong nowhere.

    Args:
        model: has the adapter.
        prefix: how the names of the method's modules begin.
        state_dict: names as in the model -> tensors.
        whole: whether these are all tensors of an adapter, as files have them, or some that somebody has picked, such
            as every lora_B (federated training with a frozen lora_A).
    """
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, MergingLayer)}
    if any(adapter in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"Adapter {adapter!r} is merged, so that the model would not show what is loaded into it. Call "
            "`model.unmerge_adapter()` before, and merge it again afterwards. Nothing was loaded."
        )
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    strange: list[str] = []
    found: dict[str, set[str]] = {}  # layer -> what there is of it
    for key, values in state_dict.items():
        layer, _, part = key.rpartition("." + prefix)
        content = content_of(prefix + part, config) if layer else None
        if content is not None and layer in layers and adapter in layers[layer].adapter_options:
            check_tensor(key, values, content)
            found.setdefault(layer, set()).add(prefix + part.split(".")[0])
        elif layer or key not in own:
            strange.append(key)
    for name, kinds in found.items():
        layer = layers[name]  # whose own name is the one that patterns of names are for
        shapes = config.expected_shapes(layer.name, layer.out_features, layer.in_features)
        known = {key.split(".")[0] for key in shapes}
        if other := kinds ^ known if whole else kinds - known:
            what = "lacks" if other - kinds else "has"
            raise ValueError(
                f"The adapter file {what} {min(other)!r} for module {name!r}, otherwise than adapter {adapter!r} of "
                "the model, of which a part would stay what it was, or the file's would get lost. Load it with the "
                "options that it was trained with (`learn_scales`, `act_scale`, a rank of 0): see its "
                "adapter_config.json. Nothing was loaded."
            )
    if strange:
        warnings.warn(
            f"{len(strange)} tensors of the adapter file are no part of adapter {adapter!r} in this model, e.g. "
            f"{strange[0]!r}, and are left out. Is this the model, with the configuration, that the adapter was "
            "trained with?",
            stacklevel=2,
        )


def _found(values: torch.Tensor) -> str:
    if not values.is_floating_point() or not values.numel():
        return str(values.dtype)
    finite = values.isfinite()
    if not finite.all():
        return f"{int((~finite).sum())} that are NaN or infinite"
    return f"{values.dtype}, the smallest {float(values.min()):.3g}"


def check_shapes(here: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise ValueError if tensors of an adapter's file do not fit, before the first of them is copied."""
    for key in here.keys() & found.keys():
        shapes = tuple(found[key].shape), tuple(here[key].shape)
        if shapes[0] != shapes[1] and len(shapes[0]) == len(shapes[1]):  # FSDP1 shows flat shards
            raise ValueError(
                f"In the adapter file {key!r} has shape {shapes[0]}, but this model needs {shapes[1]}. The adapter was "
                "made for another grid or architecture, rank or group size: load it on the model, with the "
                "configuration, that it was trained with. Nothing was loaded."
            )


def _bases(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The bases under an adapter, by the names of its layers."""
    return {
        path: layer.frozen
        for path, layer in model.named_modules()
        if isinstance(layer, MergingLayer) and adapter_name in layer.adapter_options
    }


def note_sharded_base(model: nn.Module, configs: dict[str, Any]) -> bool:
    """Note for each adapter which integers its base is, if FSDP has sharded that, and return whether it has.

    With accelerate's `cpu_ram_efficient_loading`, its default, transformers 5.17 loads weights in the first process
    only. What the others convert is empty until FSDP gives them the first one's, and their noted checksum is of that.
    A collective call: for a forward of the sharded model, which is one, too.
    """
    sharded = False
    for name, config in configs.items():
        bases = list(_bases(model, name).values())
        if bases and hasattr(bases[0].base, "full_tensor"):
            sharded, config.base_checksum = True, in_order(int(base.checksum()) for base in bases)
    return sharded


def note_changed_base(model: nn.Module, configs: dict[str, Any]) -> None:
    """Note for each adapter which base it lies over, if that is another than the model was converted to.

    New float weights may have been set (PEFT's `set_base_model_state_dict`); somebody may have written to the integers,
    with a whole state dict or an average of all tensors of one; blocks may have been taken out or have changed places.
    Only what may have changed is read, and nothing of what FSDP2 shards (`note_sharded_base`).
    """
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, MergingLayer)}
    written = {name for name, layer in layers.items() if is_rewritten(layer.frozen)}
    anew = {name for name, layer in layers.items() if getattr(layer.frozen, "replaced", False)}
    for name, config in configs.items():
        own = {path: layer for path, layer in layers.items() if name in layer.adapter_options}
        if not own or config.base_checksum is None:
            continue
        known = _fingerprint(own)
        # more layers: PEFT lets the name of an adapter be used again, and the configuration is the second one's
        moved = known != config.base_fingerprint and len(own) <= config._converted
        if not moved and own.keys().isdisjoint(written | anew):
            continue
        sharded = any(hasattr(getattr(layer.frozen, "base", None), "full_tensor") for layer in own.values())
        found = config.base_checksum if sharded else in_order(int(layer.frozen.checksum()) for layer in own.values())
        if found != config.base_checksum:
            for path in own.keys() & written:
                own[path].frozen.source_checksum = None
            known = _fingerprint(own)
            if known is None or own.keys().isdisjoint(anew):
                warnings.warn(
                    f"The base under adapter {name!r} is another than the model was converted to: somebody has written "
                    "to its integers, or loaded a state dict, or has taken blocks out or moved them. The adapter's "
                    "file says so, and is refused on the model that it began with. Where a state dict is averaged "
                    "(EMA), leave tensors of integers as they are.",
                    stacklevel=2,
                )
        config.base_checksum, config.base_fingerprint = found, known
    for path in written | anew:
        take_note(layers[path].frozen)
        layers[path].frozen.replaced = False


def _fingerprint(layers: dict[str, Any]) -> str | None:
    return fingerprint(layers, {path: layer.frozen.source_checksum for path, layer in layers.items()})


def check_same_base(
    model: nn.Module, config: Any, adapter_name: str, saved: dict[str, torch.Tensor], name: str
) -> None:
    """Raise ValueError if an adapter was trained over other integers than the model's.

    Args:
        config: of the adapter in the model.
        saved: the checksums, called `name`, of its file: one for the adapter, or, from earlier versions, one a layer.
    """
    layers = _bases(model, adapter_name)
    signed = config.signed_scales and not config.wants_quantized_base
    for key, value in saved.items():
        where = key.partition(f".{name}")[0]
        known = layers.get(where, layers.get(where.removeprefix(PREFIX)))
        meant = layers.values() if known is None and where in ("", name, PREFIX[:-1]) else [known] if known else []
        if meant:
            version = version_of(required := of_tensor(value))
            found = in_order((int(frozen.checksum(version)) for frozen in meant), version)
            check_checksum(found, required, signed)
