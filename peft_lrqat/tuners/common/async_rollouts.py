"""TRL's asynchronous trainers, which describe a policy to the engine before they merge it.

`AsyncGRPOTrainer` and `AsyncDistillationTrainer` (TRL 1.15 and later) tell vLLM once, before training, the name, dtype
and shape of every weight that it is going to receive, from the *unmerged* model; the weights are sent when the adapter
is merged. In a LoRA model both have the same names. Here the unmerged model has the integers of its bases, which no
engine knows, where the merged one has the float model's weights; and the integers cannot be hidden from
`named_parameters()`, since whatever places, shards or counts parameters has to find them there.

If the server can serve LoRA adapters, the same trainers send the adapter alone. They take an `LRQATConfig` for a
`LoraConfig`, which it is, but its product is in grid steps and belongs inside the rounding.

In either case TRL asks nothing of this package, so the two functions of TRL that decide are told about our layers when
a model is converted; these trainers make the model themselves, so that is before they list or decide anything. What
they do to other models does not change. Replaced is their code rather than their name, because others may hold them
already.
"""

from __future__ import annotations

import contextlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...modules.served_weight import refuse_rounded_inputs
from .config import GridConfig
from .layer import MergingLayer

_TRAINERS = (
    "trl.experimental.async_grpo.async_grpo_trainer",
    "trl.experimental.async_distillation.async_distillation_trainer",
)


def teach_async_trainers() -> None:
    """Tell TRL's asynchronous trainers, where they have been imported, about the layers of this package."""
    for name in _TRAINERS:
        module: Any = sys.modules.get(name)
        if module is None or not hasattr(module, "is_peft_model"):  # earlier versions take no PEFT models
            continue
        try:
            _replace(module._iter_vllm_named_params, _walk, "_peft_lrqat_walk", _listing)
            _replace(module.validate_lora_for_vllm_sync, _check, "_peft_lrqat_check", _lora_check)
        except (AttributeError, ValueError) as error:
            warnings.warn(
                f"{name} lists the weights of a model for vLLM in a way that this package does not know ({error}), and "
                "would announce other weights than it sends. Use GRPOTrainer with this model, and please report your "
                "version of TRL.",
                stacklevel=2,
            )


def _walk(model):  # only its code is used, in place of TRL's
    yield from _peft_lrqat_walk(model)  # type: ignore[name-defined]  # noqa: F821


def _check(model):
    return _peft_lrqat_check(model)  # type: ignore[name-defined]  # noqa: F821


def _replace(function: Any, by: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Let `function` run the code of `by`, which finds `make(the original)` as the global `name`; once.

    Raises:
        AttributeError, ValueError: `function` is not a plain function.
    """
    there = function.__globals__
    if name not in there:
        original = types.FunctionType(function.__code__, there, function.__name__)
        there[name] = make(original)
        function.__code__ = by.__code__


def _listing(walk: Callable[[nn.Module], Iterator[tuple[str, nn.Parameter]]]) -> Any:
    """`walk`, which lists an unmerged model of this package as it will list the merged one."""

    def listing(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        unmerged = [layer for layer in model.modules() if isinstance(layer, MergingLayer) and not layer.merged]
        if not unmerged:
            yield from walk(model)
            return
        with _described(unmerged):
            found = list(walk(model))
        yield from found

    return listing


@contextlib.contextmanager
def _described(layers: Sequence[MergingLayer]) -> Iterator[None]:
    """Put descriptions, without bytes, in the place of the bases, which are not touched: no rank needs another one."""
    bases = [layer.base_layer for layer in layers]
    try:
        for layer in layers:
            info = layer.info_for()
            refuse_rounded_inputs(info.activations)
            shape = (info.out_features, info.in_features)
            weight = torch.empty(shape[::-1] if info.kind == "conv1d" else shape, dtype=info.dtype, device="meta")
            described: nn.Module = _DescribedExperts(layer.frozen.experts, weight)
            if layer.frozen.experts == 1:
                described = nn.Module()
                described.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
            described.register_parameter("bias", layer.base_layer.bias)
            layer.base_layer = described
        yield
    finally:
        for layer, base in zip(layers, bases, strict=True):
            layer.base_layer = base


class _DescribedExperts(nn.Module):
    """What `modules.experts.Experts` asks of the layer of all experts to show the names and shapes of their parts."""

    def __init__(self, experts: int, weight: torch.Tensor) -> None:
        super().__init__()
        self._experts, self._weight = experts, weight

    def served(self, names: tuple[str, ...]) -> dict[str, nn.Parameter]:
        part = self._weight[: self._weight.shape[0] // (self._experts * len(names))]
        called = [f"{e}.{name}.weight" for e in range(self._experts) for name in names]
        return {name: nn.Parameter(part, requires_grad=False) for name in called}


def _lora_check(check: Callable[[Any], Any]) -> Any:
    """`check`, which refuses adapters of this package."""

    def checked(model: Any) -> Any:
        config = model.peft_config[model.active_adapters[0]] if model.active_adapters else None
        if isinstance(config, GridConfig):
            raise ValueError(
                f"An adapter of {config.method} is no LoRA adapter: an engine that added it to float weights, outside "
                "their rounding, would serve another model. Sync merged weights instead."
            )
        return check(model)

    return checked
