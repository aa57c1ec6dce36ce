"""Low-bit SR as the tests of both methods see it (`tests/tuners/conftest.py`: `method`)."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from peft_lrqat import LowBitSRConfig
from peft_lrqat.tuners.lowbit_sr import LowBitSRLinear, LowBitTensor
from tests.models import low_bit, tiny, tokens

NAME, TYPE, LAYER = "Low-bit SR", "LOWBITSR", "lowbitsr.LowBitSRLinear"
IDS = tokens(batch=4)
GRID = {"bits": 4, "group_size": 8, "range_method": "minmax"}
ATTENTION = ["q_proj", "v_proj"]
#: Adapters that start away from the base.
MOVED = {"init_weights": False}
ONLY = "lowbitsr_only"
STORED = {"lowbitsr_codes", "lowbitsr_scale", "lowbitsr_stream"}
adapt = low_bit


def config(**options: Any) -> LowBitSRConfig:
    return LowBitSRConfig(**{**GRID, "target_modules": "all-linear", **options})


def on_grid() -> PreTrainedModel:
    """A model whose linear weights lie on the grid, so that "base" and "adapted at step 0" are the same model."""
    return low_bit(tiny(), **GRID).unload()


def random_adapter(model: PreTrainedModel, **options) -> PeftModel:
    return low_bit(model, **{**GRID, **MOVED, **options}).eval()


def layers(model: nn.Module) -> dict[str, LowBitSRLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowBitSRLinear)}


def integers(model: nn.Module) -> list[torch.Tensor]:
    """Codes, scales and random streams."""
    weights = [p for p in model.parameters() if isinstance(p, LowBitTensor)]
    return [t for p in weights for t in (p.packed, p.scale, p.stream)]


def other(**options) -> LowBitSRConfig:
    return config(**{**MOVED, "target_modules": ATTENTION, **options})


def two_adapters(base: PreTrainedModel) -> PeftModel:
    model = random_adapter(base)
    model.add_adapter("other", other())
    return model.eval()


def weights(model: nn.Module) -> dict[str, LowBitTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, LowBitTensor)}


def codes(model: nn.Module) -> list[torch.Tensor]:
    return [p.codes() for p in weights(model).values()]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def run(model, optimizer, steps: int = 4, accumulate: int = 1, clip: float | None = None) -> None:
    """Train on `IDS`."""
    model.train()
    for _ in range(steps):
        for part in IDS.chunk(accumulate):
            (model(input_ids=part, labels=part).loss / accumulate).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
