"""Vectors that are trained beside an adapter, such as the weights of norms, in a model of bf16 or fp16.

PEFT trains a copy of each module that `modules_to_save` names, in the dtype of the model. For the weight of a norm that
is too coarse: between 1 and 2 bf16 has 128 numbers, so an update of 1e-3 is rounded away, and so is the next. The copy
therefore holds fp32, as adapters do (PEFT's `autocast_adapter_dtype`), and its forward finds what a checkpoint stores:

    master   fp32 (n,)                the parameter: optimizer, state dict, file of the adapter
    weight   the model's dtype (n,)   master.to(dtype), in the parameter's place: forward, merged model, checkpoint

The gradient passes through the cast as it is. Matrices (embeddings, heads) stay as PEFT has them: fp32 would double
what they take, and their entries are small, where bf16 is finer.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

HALF = (torch.bfloat16, torch.float16)


class TrainedVectors:
    """A module whose parameters are fp32, and rounded to the model's dtype while its forward runs. Instances are of
    `TrainedVectors` and of the class that they were (`plain`).

    Attributes:
        plain: the module's own class.
        vectors: names of the parameters.
        served_dtype: what they are rounded to; the model's, also where it is cast.
    """

    plain: type[nn.Module]
    vectors: tuple[str, ...]
    served_dtype: torch.dtype
    _parameters: dict[str, Any]

    @property
    def forward(self) -> Callable[..., Any]:
        """The forward of `plain`, or what others, such as Liger's kernels, have put in its place."""
        own = vars(self).get("_own_forward")  # of another name: torch.compile may take vars() for attributes
        return functools.partial(self._on_rounded, self.plain.forward.__get__(self) if own is None else own)

    @forward.setter
    def forward(self, function: Callable[..., Any]) -> None:
        vars(self)["_own_forward"] = function

    @forward.deleter
    def forward(self) -> None:
        del vars(self)["_own_forward"]

    def _on_rounded(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # FSDP1 and DataParallel have tensors among the attributes, in the place of parameters
        tables = [self._parameters if self._parameters.get(name) is not None else vars(self) for name in self.vectors]
        masters = [table[name] for table, name in zip(tables, self.vectors, strict=True)]
        try:
            for table, name, master in zip(tables, self.vectors, masters, strict=True):
                table[name] = master.to(self.served_dtype)
            return function(*args, **kwargs)
        finally:
            for table, name, master in zip(tables, self.vectors, masters, strict=True):
                table[name] = master

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """torch's, which moves and casts a module."""
        self.served_dtype = fn(torch.empty(0, dtype=self.served_dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[misc]  # of nn.Module, which instances are as well

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (self.plain, self.vectors), dict(vars(self))


class ReadAsServed(ModulesToSaveWrapper):
    """PEFT's wrapper, of which a model's own code may read a norm's weight: Mamba gives it to a kernel, or asks for its
    dtype. It finds what is served; the parameter itself is read of the module within.
    """

    def _getattr_wrapped(self, name: str, modules: Any) -> Any:
        found = super()._getattr_wrapped(name, modules)
        module = modules["modules_to_save"][self.active_adapters[0]]
        trained = isinstance(module, TrainedVectors) and name in module.vectors
        return found.to(module.served_dtype) if trained else found


def train_in_fp32(module: Any) -> None:
    """Have fp32 parameters in an nn.Module that has vectors of one half-precision dtype, and nothing else; others are
    left as they are.
    """
    named = dict(module.named_parameters())
    halves = {parameter.dtype for parameter in named.values()} & {*HALF}
    if not isinstance(module, TrainedVectors):
        own = {name for name, parameter in module._parameters.items() if parameter is not None}
        if len(halves) != 1 or named.keys() != own or any(parameter.ndim > 1 for parameter in named.values()):
            return
        forward = vars(module).pop("forward", None)
        module.__class__ = _kind(cast(Any, type(module)), tuple(named))
        if forward is not None:
            module.forward = forward
        vars(module)["served_dtype"] = halves.pop()
    for name, parameter in named.items():
        if parameter.dtype in HALF:
            module._parameters[name] = nn.Parameter(parameter.data.float(), parameter.requires_grad)


def settle_vectors(model: nn.Module) -> None:
    """Leave the rounded vectors, in modules of the classes that they were."""
    module: Any
    for module in model.modules():
        if isinstance(module, TrainedVectors):
            for name in module.vectors:
                master = module._parameters[name]
                module._parameters[name] = nn.Parameter(master.detach().to(module.served_dtype), master.requires_grad)
            forward = vars(module).pop("_own_forward", None)
            del module.served_dtype
            module.__class__ = cast(Any, module.plain)
            if forward is not None:
                module.forward = forward


def as_served(module: nn.Module) -> nn.Module:
    """The module as `settle_vectors` would leave it: a copy of one that is trained so, or itself."""
    if not isinstance(module, TrainedVectors):
        return module
    served = copy.deepcopy(module)
    settle_vectors(served)
    return served


@functools.cache
def _kind(plain: Any, vectors: tuple[str, ...]) -> Any:
    """The class of such modules that were of class `plain`."""
    return type(plain.__name__, (TrainedVectors, plain), {"plain": plain, "vectors": vectors})


def _made(plain: Any, vectors: tuple[str, ...]) -> nn.Module:
    kind = _kind(plain, vectors)
    return kind.__new__(kind)
