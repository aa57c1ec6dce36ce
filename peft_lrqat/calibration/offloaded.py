"""Models that do not fit in float: their decoder blocks stay where they are, and come in one after the other.

As a `device_map` says, accelerate keeps parts of a model on disk, or on the CPU beside an accelerator. Their parameters
are on the meta device, and hooks bring them in for every call. Here a block is brought in once, when it is its turn,
and loses its hooks; calibration then leaves little of it. What lies outside the blocks comes in before the first of
them. transformers finds the files, renames and joins what is in them, and casts it; what it had to join lies in a
folder for the time being, the rest is read from the checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from ..checkpoint.code import class_of, without_weights
from ..checkpoint.hub import check_place
from ..checkpoint.load import HUB_OPTIONS
from ..modules.experts import ExpertStack
from ..tuners.common.experts import expose_stacks
from ..tuners.common.plain import is_offloaded, offloads
from ..tuners.common.preflight import check_targets
from .calibrate import AnyConfig, decoder_blocks


@contextlib.contextmanager
def by_block(
    model: nn.Module | str | os.PathLike,
    config: AnyConfig,
    method: str,
    options: Mapping[str, Any] | None,
) -> Iterator[nn.Module]:
    """A model whose blocks `bring_in` brings in; at the end, all of it is there and nothing is offloaded any more.

    Args:
        model: a model, which may be offloaded; or what `from_pretrained` takes, then it is loaded without its blocks.
        config: what it will be quantized with.
        method: what goes through the blocks, for messages.
        options: `from_pretrained`'s, for a model that is loaded here.

    Raises:
        ValueError: the model cannot be quantized as `config` says (before any weight is read), or there are options
            for a model that is loaded already; or `model` is neither.
        FileNotFoundError: there is no such folder, and no repository is called so.
    """
    if not isinstance(model, (nn.Module, str, os.PathLike)):
        raise ValueError(
            f"`model` is {model!r:.80}; it must be a model, a folder, or the name of a repository of the Hub."
        )
    if isinstance(model, nn.Module):
        if options is not None:
            raise ValueError(
                "`model_init_kwargs` are for a model that is loaded here, but `model` is one already. Leave them out, "
                "or give the name of the model or its folder."
            )
        with _settled(model):
            yield model
        return
    with tempfile.TemporaryDirectory() as scratch:
        loaded = _load_without_blocks(model, config, method, {"offload_folder": scratch, **(options or {})})
        with _settled(loaded):
            yield loaded


def _load_without_blocks(
    pretrained: str | os.PathLike, config: AnyConfig, method: str, options: dict[str, Any]
) -> nn.Module:
    trusted = options["trust_remote_code"] = bool(options.get("trust_remote_code"))  # None: transformers would ask
    described = options.pop("config", None)
    if described is None:
        check_place(pretrained)
        described = AutoConfig.from_pretrained(pretrained, **{k: options[k] for k in HUB_OPTIONS if k in options})
    kind, skeleton = class_of(described, trusted), without_weights(described, trusted)
    if skeleton is None:
        raise ValueError(
            f"config.json of {str(pretrained)!r} does not say which class the model is of. Load it with "
            f"`from_pretrained`, the blocks offloaded by a `device_map`, and give the model."
        )
    name, _, _ = decoder_blocks(skeleton, config, method, loading=True)
    options["device_map"] = _device_map(skeleton, name, _device(options.get("device_map", "auto")))
    with _unsurprised():
        return kind.from_pretrained(pretrained, config=described, **options).eval()


@contextlib.contextmanager
def _unsurprised() -> Iterator[None]:
    """Let accelerate not warn that parameters are offloaded, by a device map that is made here and not the user's."""
    logger = logging.getLogger("accelerate.big_modeling")

    def other(record: logging.LogRecord) -> bool:
        return "they were offloaded to" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _device(device_map: Any) -> str | int:
    """The one device on which blocks compute, as safetensors knows it."""
    if isinstance(device_map, Mapping) and len(device_map) == 1:
        (device_map,) = device_map.values()
    if device_map == "auto":
        # a CUDA build of torch names "cuda" on a machine without one, too
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return "cpu" if kind is None else f"{kind.type}:{torch.accelerator.current_device_index()}"
    try:
        torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"`model_init_kwargs` has the device map {device_map!r}, but blocks that come in one by one compute on one "
            "device. Name that ('cuda:0'), or leave it out: 'auto' is the accelerator, or the CPU if there is none."
        ) from None
    return device_map if isinstance(device_map, int) else str(device_map)


def _device_map(model: nn.Module, blocks: str, device: str | int) -> dict[str, str | int]:
    """Everything on `device`, but the list of blocks, which stays on disk."""
    found: dict[str, str | int] = {blocks: "disk"}
    path = ""
    for part in blocks.split("."):
        owner = model.get_submodule(path)
        prefix = f"{path}." if path else ""
        others = {*owner._parameters, *owner._buffers, *owner._modules} - {part}
        found |= {prefix + other: device for other in others}
        path = prefix + part
    return found


def arrive(
    model: nn.Module, block: nn.Module, layers: Mapping[str, nn.Linear], config: AnyConfig
) -> dict[str, nn.Linear]:
    """Bring in a block that is offloaded, and make layers of those of its experts that are meant.

    Args:
        layers: of the block, as `decoder_blocks` has found them.

    Returns:
        The layers, which are in the model now.

    Raises:
        ValueError: the values of an offloaded layer cannot be quantized.
    """
    was_offloaded = is_offloaded(block)
    if was_offloaded:
        bring_in(block)
    stacks = [name for name, layer in layers.items() if isinstance(layer, ExpertStack)]
    there: dict[str, nn.Linear] = {**layers, **expose_stacks(model, stacks)}
    if was_offloaded:
        check_targets(model, dict(there), config)
    return there


def bring_in(module: nn.Module, *, without: nn.Module | None = None) -> None:
    """Put the parameters of a module and of those within it where they compute, for good.

    Args:
        without: a module within it that stays as it is.
    """
    left = set() if without is None else set(without.modules())
    for one in [one for one in module.modules() if one not in left and offloads(one)]:
        from accelerate.hooks import remove_hook_from_module

        with onloaded(one):
            parameters, buffers = dict(one._parameters), dict(one._buffers)
        remove_hook_from_module(one)
        if getattr(vars(one).get("forward"), "__func__", None) is type(one).forward:
            del (
                one.forward
            )  # accelerate leaves it there, a cycle that would keep the weights of a layer that is replaced
        # taking the parameters out has put others in their place, which nothing else refers to
        one._parameters.update(parameters)
        one._buffers.update(buffers)


@contextlib.contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """The parameters of a module itself are there, wherever accelerate keeps them."""
    if not offloads(module):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def all_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and every buffer of a model, by name, brought in while the iterator stands there."""
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        path, _, part = name.rpartition(".")
        owner = model.get_submodule(path)
        with onloaded(owner):
            yield name, getattr(owner, part)


@contextlib.contextmanager
def _settled(model: nn.Module) -> Iterator[None]:
    """At the end, have what was offloaded be a model like any other."""
    offloaded = is_offloaded(model)
    yield
    if not offloaded:
        return
    from accelerate.hooks import remove_hook_from_module

    bring_in(model)
    remove_hook_from_module(model, recurse=True)
    if hasattr(model, "hf_device_map"):
        model.hf_device_map = {"": next(model.parameters()).device}  # type: ignore[assignment]  # PEFT reads it
