"""Models that several test files of this folder start from."""

from __future__ import annotations

import copy

import pytest
from peft import PeftModel
from transformers import PreTrainedModel

from peft_lrqat import LRQATConfig
from tests.lrqat.common import ATTENTION, GRID, random_adapter
from tests.models import adapted, tiny


@pytest.fixture(scope="module")
def grid_model() -> PreTrainedModel:
    """A model whose linear weights lie on the grid, so that "base" and "adapted at step 0" are the same model."""
    return adapted(tiny(), **GRID).unload()


@pytest.fixture
def base(grid_model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(grid_model)


@pytest.fixture
def two_adapters(base: PreTrainedModel) -> PeftModel:
    model = random_adapter(base)
    model.add_adapter("other", LRQATConfig(**GRID, r=2, target_modules=ATTENTION, init_lora_weights=False))
    return model.eval()
