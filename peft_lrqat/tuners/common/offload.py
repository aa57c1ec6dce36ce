"""Bases in the CPU's memory (`offload_base`): which layers of a model take part, and in which order they run.

Layers that are computed again together, by gradient checkpointing, are a block; outside of such, the layers in one
entry of a list of modules are.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...ops.staging import Schedule
from .frozen import FrozenWeight
from .layer import MergingLayer
from .parallel import announced_fsdp, announced_zero, has_peers

_WHY = "`offload_base=True` keeps the base of every layer whole in the memory of the CPU, but {who}. {instead}"
FSDP = _WHY.format(
    who="FSDP shards the base and takes it to the GPU",
    instead="Leave `offload_base` out (FSDP2 has an offload of its own, `fsdp_offload_params`), or use plain data "
    "parallelism (`torchrun --nproc-per-node N script.py`).",
)
ZERO = _WHY.format(
    who="DeepSpeed sends every parameter from GPU to GPU when it begins",
    instead="Leave one of the two out, or use plain data parallelism (`torchrun --nproc-per-node N script.py`).",
)


def check_offload_announced() -> None:
    """Raise ValueError if the announced way of training takes bases from the CPU's memory."""
    if announced_fsdp() is not None:
        raise ValueError(FSDP)
    if announced_zero() is not None:
        raise ValueError(ZERO)


def arrange(model: nn.Module, offload: bool) -> None:
    """Give the offloaded layers of a model their order.

    Args:
        offload: offload those that are not yet, too.
    """
    layers = {name: layer for name, layer in _layers(model).items() if offload or layer.frozen.offloaded}
    blocks: dict[str, int] = {}
    schedule = Schedule()
    inside = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    for name, layer in layers.items():
        block = blocks.setdefault(_block(name, inside), len(blocks))
        layer.frozen.offload(schedule, block, name)


def offloaded_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters that lie in the CPU's memory."""
    bases = {f"{name}.base_layer": layer.frozen for name, layer in _layers(model).items() if not layer.merged}
    kept = {name: base for name, base in bases.items() if base.offloaded}
    return [f"{name}.{part}" for name, base in kept.items() for part in base.STORED if getattr(base, part) is not None]


def check_offload_sharded(model: nn.Module) -> None:
    """Raise ValueError if FSDP has taken a model with offloaded layers."""
    if not has_peers():  # before a walk through the model, in every step
        return
    bases = [layer.frozen for layer in _layers(model).values()]
    if any(base.offloaded and hasattr(base.base, "full_tensor") for base in bases):
        raise ValueError(FSDP)


def _layers(model: nn.Module) -> dict[str, Any]:
    """Those that can be offloaded: embeddings look up rows, and low-bit SR may have dropped a base."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MergingLayer) and isinstance(module.frozen, FrozenWeight) and module.kind != "embedding"
    }


def _block(name: str, checkpointed: list[str]) -> str:
    """What a layer is computed again with, or else the first entry of a list that it is in."""
    around = [outer for outer in checkpointed if name.startswith(f"{outer}.")]
    if around:
        return max(around, key=len)
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])
