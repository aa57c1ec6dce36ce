"""What several test files of this folder use."""

from __future__ import annotations

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from peft_lrqat import LowBitSRConfig
from peft_lrqat.tuners.lowbit_sr import LowBitSRLinear
from tests.models import low_bit, tiny, tokens

IDS = tokens(batch=4)
GRID = {"bits": 4, "group_size": 8, "range_method": "minmax"}
ATTENTION = ["q_proj", "v_proj"]


def on_grid() -> PreTrainedModel:
    """A model whose linear weights lie on the grid, so that "base" and "adapted at step 0" are the same model."""
    return low_bit(tiny(), **GRID).unload()


def random_adapter(model: PreTrainedModel, **config) -> PeftModel:
    return low_bit(model, **{**GRID, "init_weights": False, **config}).eval()


def layers(model: nn.Module) -> dict[str, LowBitSRLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowBitSRLinear)}


def other(**options) -> LowBitSRConfig:
    return LowBitSRConfig(**{**GRID, "init_weights": False, "target_modules": ATTENTION, **options})


def two_adapters(base: PreTrainedModel) -> PeftModel:
    model = random_adapter(base)
    model.add_adapter("other", other())
    return model.eval()
