"""Bases in the CPU's memory (`offload_base`): how a layer holds one there, which layers of a model take part, and in
which order they run.

Layers that are computed again together, by gradient checkpointing, are a block; outside of such, the layers in one
entry of a list of modules are.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...ops.staging import Schedule, Stored, in_memory
from .layer import MergingLayer
from .packed_parameter import PackedParameter, whole
from .parallel import announced_fsdp, announced_zero, has_peers
from .staying import StaysHere

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


class Offloadable(StaysHere):
    """A base whose integers (`FrozenWeight` says which) lie where it computes, or in the CPU's memory, from which they
    are copied to be used.

    Attributes:
        offloaded: whether they lie in the CPU's memory.
        schedule, block: the order of such layers in the model, and where in it this one is (`ops/staging.py`).
    """

    base: nn.Parameter
    scale0_bits: nn.Parameter
    zero_point: nn.Parameter | None
    offloaded: bool = False
    schedule: Schedule
    block: int = 0
    _device: torch.device | None = None  # where it computes, if it is offloaded
    _name: str = ""

    #: The parameters that are stored in integers.
    STORED = ("base", "scale0_bits", "zero_point")

    #: The attributes that say where they lie.
    description = frozenset({"offloaded", "schedule", "block", "_device", "_name"})

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return self.base.device if self._device is None else self._device

    @property
    def scale0(self) -> torch.Tensor:
        """s0: fp32 (rows, groups), weight units per grid step, on the layer's device."""
        return self.here(self.scale0_bits).view(torch.float32)

    def here(self, tensor: Any) -> Any:
        """All of one of the layer's tensors, on its device."""
        return whole(tensor) if tensor is None else whole(tensor).to(self.device)

    def stored(self) -> Stored:
        """What operations take: base, s0 and zero point. They may be staged (`ops/staging.py`)."""
        tensors = self._tensors()
        if not self.offloaded or torch.compiler.is_compiling():
            return tensors
        if self.schedule.knows(self.block, self._name, tensors, self.device):
            return tensors
        self._settle()  # of a copy of a model, or one whose tensors somebody has moved
        return self._tensors()

    def _tensors(self) -> Stored:
        held: Any = self._parameters  # every product asks, and `self.base` takes half a microsecond
        return whole(held["base"]), whole(held["scale0_bits"]).view(torch.float32), whole(held["zero_point"])

    def offload(self, schedule: Schedule | None = None, block: int = 0, name: str = "") -> None:
        """Have the integers in the CPU's memory from now on; where the layer computes stays the same.

        Args:
            schedule, block, name: the order of such layers, and the layer's place and name in it. None: an order of its
                own.
        """
        self.offloaded, self._device = True, self.device
        self.schedule, self.block, self._name = schedule or Schedule(), block, name
        self._settle()

    def _settle(self) -> None:
        """Bring offloaded tensors to where they can be copied from, and take note of them."""
        for name in self.STORED:
            parameter = self._parameters[name]
            if parameter is not None and (there := in_memory(parameter.data, self.device)) is not parameter.data:
                self._parameters[name] = PackedParameter(there)
        self.schedule.hold(self.block, self._name, self._tensors(), self.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if not self.offloaded:
            return super()._apply(fn, recurse)
        stays = {name: self._parameters.pop(name) for name in self.STORED}
        try:
            super()._apply(fn, recurse)
        finally:
            others = dict(self._parameters)
            self._parameters.clear()
            self._parameters.update({**stays, **others})
        self._device = fn(torch.empty(0, device=self.device)).device
        self._settle()
        return self


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
        if isinstance(module, MergingLayer) and isinstance(module.frozen, Offloadable) and module.kind != "embedding"
    }


def _block(name: str, checkpointed: list[str]) -> str:
    """What a layer is computed again with, or else the first entry of a list that it is in."""
    around = [outer for outer in checkpointed if name.startswith(f"{outer}.")]
    if around:
        return max(around, key=len)
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])
