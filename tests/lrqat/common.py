"""What several test files of this folder use."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from peft_lrqat.lrqat import LRQATLinear
from peft_lrqat.ops.reference import codes
from tests.models import adapted, tokens

IDS = tokens(batch=4)
GRID = {"bits": 4, "group_size": 8}
ATTENTION = ["q_proj", "v_proj"]


def random_adapter(model: PreTrainedModel, **config) -> PeftModel:
    return adapted(model, **{**GRID, "init_lora_weights": False, **config}).eval()


def layers(model: nn.Module) -> dict[str, LRQATLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LRQATLinear)}


def codes_of(layer: LRQATLinear, *adapters: str) -> torch.Tensor:
    _, A, B, c = layer._operands(list(adapters))
    return codes(layer.frozen.base, A, B, layer.frozen.fmt, c)
