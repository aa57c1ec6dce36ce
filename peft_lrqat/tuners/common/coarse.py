"""A warning where what is trained in float beside an adapter is bf16 or fp16, and so coarse that nothing would move.

The numbers of bf16 lie 1/256 to 1/128 of themselves apart. A rule like AdamW moves a weight by about the learning rate
in each update; where that is less than half of the way to the next number, it is rounded away, each time. Adapters are
fp32, and so are norms beside them (`modules/trained_vectors.py`); embeddings, heads, and what was made without PEFT's
`autocast_adapter_dtype` (as by transformers' `add_adapter`) are in the dtype of the model.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...modules.trained_vectors import HALF
from .first_step import FirstStep, rate_of

# weights of a module that are looked at
_SOME = 1 << 16


def _look(optimizer: Optimizer, found: list[tuple[dict[str, Any], list[Any]]]) -> None:
    for group, modules in found:
        rate = rate_of(group)
        for name, module in modules:
            weight = getattr(module(), "weight", None)
            if rate is None or weight is None or weight.dtype not in HALF:
                continue
            if (lost := _lost(weight, rate)) > 0.5:
                warnings.warn(
                    f"{name!r} is trained in {str(weight.dtype).removeprefix('torch.')} at a learning rate of "
                    f"{rate:.2g}, and {lost:.0%} of its numbers lie so far apart that {type(optimizer).__name__}'s "
                    "updates are rounded away. Load the model in float32 (`dtype=torch.float32`, with `bf16=True` in "
                    "the Trainer's arguments), or raise the rate. Norms are trained in fp32 in any model, where "
                    "`get_peft_model` makes the adapter and `autocast_adapter_dtype` is left as it is.",
                    stacklevel=3,
                )
                return


@torch.no_grad()
def _lost(weight: torch.Tensor, rate: float) -> float:
    """How many of a weight's numbers stay what they are where `rate` is added."""
    held: Any = weight
    some = (held.to_local() if hasattr(held, "to_local") else held).flatten()[:_SOME]
    return float((some + torch.sign(some) * rate == some).float().mean()) if some.numel() else 0.0


_first_step = FirstStep(_look)


def watch(name: str, module: nn.Module) -> None:
    """Look at what is trained of a module in the first step of the next optimizer that trains it."""
    for inner, part in module.named_modules(prefix=name):
        if part._parameters.get("weight") is not None:
            _first_step.watch(part, (inner, weakref.ref(part)))
