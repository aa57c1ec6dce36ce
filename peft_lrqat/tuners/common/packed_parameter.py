"""A parameter of integers, which an optimizer, a cast or a way of sharding leaves as it is; and state dicts of such."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...ops.staging import versions
from .parallel import FSDP1, ZERO3, Mark

# Inside `packed_state_dict()`, state dicts hold the base as it is stored; outside, as the float weight it stands for.
_PACKED = contextvars.ContextVar("packed_state_dict", default=False)


@contextlib.contextmanager
def packed_state_dict() -> Iterator[None]:
    """State dicts made in this context never materialise a float weight."""
    token = _PACKED.set(True)
    try:
        yield
    finally:
        _PACKED.reset(token)


def packs_state_dicts() -> bool:
    """Whether this is called within `packed_state_dict`."""
    return _PACKED.get()


def whole(tensor: Any) -> Any:
    """All of a tensor that FSDP2 may have sharded (a collective call then: every rank must make it)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weight_of(container: Any, name: str) -> Any:
    """All of the weight of one entry of an nn.ModuleDict; None where there is no such entry.

    As `container[name].weight`, but every forward asks for some, and torch looks modules and parameters up in Python.
    """
    module = container._modules.get(name)
    if module is None:
        return None
    weight = module._parameters.get("weight")
    return whole(module.weight if weight is None else weight)  # parametrized, it is computed


def share(tensor: Any) -> Any:
    """This rank's part of a tensor that FSDP2 may have sharded (no collective call)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class PackedParameter(nn.Parameter):
    """A frozen integer parameter. FSDP2 shards it; FSDP1 and DeepSpeed ZeRO-3 are refused when they take it.

    Attributes:
        noted_version: torch's count of writes to it when somebody took note of it; -1: nobody has, as of a copy.
    """

    noted_version: int | None = -1
    _fsdp_flattened = Mark(FSDP1, asking=True)  # torch.distributed.fsdp._common_utils.FSDP_FLATTENED
    ds_param_type = Mark(ZERO3)  # the first that `deepspeed.zero.Init` sets

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> PackedParameter:
        return super().__new__(cls, data, requires_grad=False)

    def requires_grad_(self, requires_grad: bool = True) -> PackedParameter:
        """As torch's, but True is an error that says what can be trained instead."""
        if requires_grad:
            raise RuntimeError(
                "`requires_grad_(True)` asks for gradients of a frozen base, which is integers and has none. "
                "`model.set_adapter(name)` makes an adapter trainable; other weights are trained in float with "
                "`modules_to_save`, and every linear weight, as integers, with LowBitSRConfig."
            )
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[type, tuple[torch.Tensor]]:
        return PackedParameter, (self.detach(),)


def take_note(base: nn.Module) -> None:
    """Take note of the integers of a base as they are, for `is_rewritten`."""
    for parameter in _integers(base):
        parameter.noted_version = versions([parameter])[0]


def is_rewritten(base: nn.Module) -> bool:
    """Whether the integers of a base may be others than when `take_note` was called. Never where FSDP2 shards them."""
    return any(getattr(p, "noted_version", -1) != versions([p])[0] for p in _integers(base))


def _integers(base: nn.Module) -> list[Any]:
    # of any class: `load_state_dict(..., assign=True)` makes plain parameters
    return [p for p in base.parameters() if not p.is_floating_point() and not hasattr(p, "full_tensor")]
