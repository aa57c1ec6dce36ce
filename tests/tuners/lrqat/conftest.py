"""Models that several test files of this folder start from."""

from __future__ import annotations

import copy

import pytest
from peft import PeftModel
from transformers import PreTrainedModel

from tests import lrqat as common


@pytest.fixture(scope="module")
def grid_model() -> PreTrainedModel:
    return common.on_grid()


@pytest.fixture
def base(grid_model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(grid_model)


@pytest.fixture
def two_adapters(base: PreTrainedModel) -> PeftModel:
    return common.two_adapters(base)
