"""LR-QAT as the tests of both methods see it (`tests/tuners/conftest.py`: `method`), and helpers of its own tests."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from peft_lrqat import LRQATConfig
from peft_lrqat.ops.reference import codes
from peft_lrqat.tuners.lrqat import LRQATLinear
from tests.models import adapted, tiny, tokens

NAME, TYPE, LAYER = "LR-QAT", "LRQAT", "lrqat.LRQATLinear"
IDS = tokens(batch=4)
GRID = {"bits": 4, "group_size": 8}
ATTENTION = ["q_proj", "v_proj"]
#: Adapters that start away from the base.
MOVED = {"init_lora_weights": False}
ONLY = "lora_only"
STORED = {"lora_A.weight", "lora_B.weight", "lora_scale_shift.weight"}
adapt = adapted


def config(**options: Any) -> LRQATConfig:
    return LRQATConfig(**{**GRID, "r": 4, "target_modules": "all-linear", **options})


def on_grid() -> PreTrainedModel:
    """A model whose linear weights lie on the grid, so that "base" and "adapted at step 0" are the same model."""
    return adapted(tiny(), **GRID).unload()


def random_adapter(model: PreTrainedModel, **options) -> PeftModel:
    return adapted(model, **{**GRID, **MOVED, **options}).eval()


def layers(model: nn.Module) -> dict[str, LRQATLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LRQATLinear)}


def codes_of(layer: LRQATLinear, *adapters: str) -> torch.Tensor:
    shift, A, B, c = layer._operands(list(adapters))
    return codes(layer.frozen.base, A, B, layer.frozen.fmt, c, layer._units(shift))


def integers(model: nn.Module) -> list[torch.Tensor]:
    """Codes and scales of the active adapters."""
    found = []
    for layer in layers(model).values():
        shift, A, B, c = layer._operands(layer.active_adapters)
        levels = codes(layer.frozen.base, A, B, layer.frozen.fmt, c, layer._units(shift))
        found += [levels, layer._scale(shift)]
    return found


def other(**options) -> LRQATConfig:
    return config(**{"r": 2, "target_modules": ATTENTION, **MOVED, **options})


def two_adapters(base: PreTrainedModel) -> PeftModel:
    model = random_adapter(base)
    model.add_adapter("other", other())
    return model.eval()
