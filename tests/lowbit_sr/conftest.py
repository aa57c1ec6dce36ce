"""Models that several test files of this folder start from."""

from __future__ import annotations

import copy

import pytest
from peft import PeftModel
from transformers import PreTrainedModel

from tests.lowbit_sr.common import GRID, other, random_adapter
from tests.models import low_bit, tiny


@pytest.fixture(scope="module")
def grid_model() -> PreTrainedModel:
    """A model whose linear weights lie on the grid, so that "base" and "adapted at step 0" are the same model."""
    return low_bit(tiny(), **GRID).unload()


@pytest.fixture
def base(grid_model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(grid_model)


@pytest.fixture
def two_adapters(base: PreTrainedModel) -> PeftModel:
    model = random_adapter(base)
    model.add_adapter("other", other())
    return model.eval()
