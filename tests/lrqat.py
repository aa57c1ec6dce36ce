"""What several test files of this folder use."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from peft_lrqat import LRQATConfig
from peft_lrqat.ops.reference import codes
from peft_lrqat.tuners.lrqat import LRQATLinear
from tests.models import adapted, tiny, tokens

IDS = tokens(batch=4)
GRID = {"bits": 4, "group_size": 8}
ATTENTION = ["q_proj", "v_proj"]


def on_grid() -> PreTrainedModel:
    """A model whose linear weights lie on the grid, so that "base" and "adapted at step 0" are the same model."""
    return adapted(tiny(), **GRID).unload()


def random_adapter(model: PreTrainedModel, **config) -> PeftModel:
    return adapted(model, **{**GRID, "init_lora_weights": False, **config}).eval()


def layers(model: nn.Module) -> dict[str, LRQATLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LRQATLinear)}


def codes_of(layer: LRQATLinear, *adapters: str) -> torch.Tensor:
    _, A, B, c = layer._operands(list(adapters))
    return codes(layer.frozen.base, A, B, layer.frozen.fmt, c)


def other(**options) -> LRQATConfig:
    return LRQATConfig(**{**GRID, "r": 2, "target_modules": ATTENTION, "init_lora_weights": False, **options})


def two_adapters(base: PreTrainedModel) -> PeftModel:
    model = random_adapter(base)
    model.add_adapter("other", other())
    return model.eval()
