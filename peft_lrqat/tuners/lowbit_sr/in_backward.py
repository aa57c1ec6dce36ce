"""Updates in backward: hooks that hand a weight to `LowBitAdamW` when its gradient is complete, and what then stands
where the gradient was.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import GradientState

from ...ops.narrow_gradient import NarrowGradient
from ..common.trainers import calling_trainer

_NOTHING = contextlib.nullcontext()

_RELEASED_ERROR = (
    "This gradient was used and freed when it arrived (`fused_backward=True`), but {name} asks for it. Clipping by the "
    "global norm (Trainer: set `max_grad_norm=0`) and gradient scalers change gradients before they are used, so they "
    "need all of them at once; a second backward before `step()` needs `gradient_accumulation_steps` told to "
    "LowBitAdamW, where accelerate does not tell it; a weight that is used inside two checkpointed segments needs "
    "`use_reentrant=False`. Or use `fused_backward=False`, which DistributedDataParallel needs, of one process "
    "(torchrun), too. If this training has another optimizer, the LowBitAdamW of an earlier one is still there and has "
    "taken the gradient: delete it, and the Trainer that has it."
)


class Released(torch.Tensor):
    """Stands where a gradient was. Its norm is known; whoever would change it (or add to it) is told.

    Args:
        like: the parameter.
        norms: of parts of the gradient. Nobody may ask for the whole one's, so it is not computed before.
    """

    norms: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's docs do it

    @staticmethod
    def __new__(cls, like: torch.Tensor, norms: torch.Tensor) -> Released:
        self = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        self.norms = norms
        return self

    def __deepcopy__(self, memo: dict) -> Released:
        return Released(self, self.norms.clone())

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]  # stub lacks cls
        aten = torch.ops.aten
        if func is aten.detach.default:
            return cls(args[0], args[0].norms)
        if func is aten.linalg_vector_norm.default and _is_of_all(*args[1:]):
            return torch.linalg.vector_norm(args[0].norms, **(kwargs or {}))  # Trainer logs it
        if func is aten.mul_.Tensor and isinstance(args[0], cls) and float(args[1]) == 1.0:
            return args[0]  # clipping that does not clip
        raise RuntimeError(_RELEASED_ERROR.format(name=f"`{func._schema.name.split('::')[-1]}`"))


def _is_of_all(order: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False) -> bool:
    """Tell whether the arguments of `torch.linalg.vector_norm` ask for the 2-norm of a whole matrix."""
    return order == 2 and not keepdim and (not dim or sorted(d % 2 for d in dim) == [0, 1])


class UpdateInBackward:
    """A parameter's hook, which has an optimizer take its gradient.

    It must not keep the optimizer: Python's collector does not see references that torch's graph holds, so parameter ->
    hook -> optimizer -> parameter would never be freed.

    Args:
        optimizer: its `arrive` is called with the parameter and its group, and tells whether it took the gradient.
        group: the group's number.
    """

    def __init__(self, optimizer: Any, group: int) -> None:
        self.optimizer, self.group = weakref.ref(optimizer), group

    def __call__(self, parameter: torch.Tensor) -> None:
        optimizer = self.optimizer()
        with torch.no_grad() if torch.is_grad_enabled() else _NOTHING:  # it nearly never is
            taken = optimizer is not None and optimizer.arrive(parameter, optimizer.param_groups[self.group])
            if not taken and isinstance(parameter.grad, NarrowGradient):
                parameter.grad = parameter.grad.wide()  # others may add to it


def take_over(parameter: torch.Tensor, optimizer: Any = None) -> None:
    """End the updates in backward by an optimizer of an earlier training, which is another than `optimizer`.

    It may well be alive: SFT's, where DPO goes on with its model. It would take the gradients, and step with whatever
    learning rate its schedule ended at.
    """
    hooks: Any = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    for number, hook in list(hooks.items()):
        if isinstance(hook, UpdateInBackward) and (optimizer is None or hook.optimizer() is not optimizer):
            del hooks[number]
            parameter.taken_at_once = False  # type: ignore[attr-defined]  # hooks are on low-bit weights
            if (other := hook.optimizer()) is not None:
                other.fused_backward = False  # or it would register anew in its next step


def leave_to_trainer() -> None:
    """End the updates in backward by another optimizer than that of the Trainer that calls the caller, if one does."""
    optimizer: Any = getattr(calling_trainer(), "optimizer", None)
    while (inner := getattr(optimizer, "optimizer", None)) is not None:  # accelerate's wrapper
        optimizer = inner
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            take_over(parameter, optimizer)


def gradients_are_complete() -> bool:
    """What accelerate says of the backward pass that runs: whether it is the last before a step."""
    return GradientState._shared_state.get("sync_gradients", True)


def refuse_several_processes() -> None:
    """Raise ValueError where several processes average their gradients."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            "`fused_backward=True` updates a weight before its gradient is averaged over the data-parallel processes, "
            "which would drift apart. Use `fused_backward=False` with more than one process."
        )
