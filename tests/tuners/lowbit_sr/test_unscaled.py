"""A factor on an adapter of integers is refused."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from tests.lowbit_sr import IDS, layers, random_adapter
from tests.models import logits
from tests.refusals import check_no_factor


def test_there_is_no_factor_on_an_adapter(base: PreTrainedModel):
    """PEFT's functions would set it, and change nothing."""
    model = random_adapter(base)
    expected = logits(model, IDS)
    check_no_factor(model, next(iter(layers(model).values())), r"there is no factor .*or LRQATConfig")
    assert torch.equal(logits(copy.deepcopy(model), IDS), expected)
