"""A factor on an adapter of integers is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.helpers import rescale_adapter_scale
from transformers import PreTrainedModel

from tests.lowbit_sr import IDS, layers, random_adapter
from tests.models import logits


def test_there_is_no_factor_on_an_adapter(base: PreTrainedModel):
    """PEFT's functions would set it, and change nothing."""
    model = random_adapter(base)
    expected = logits(model, IDS)
    layer = next(iter(layers(model).values()))
    changes = (
        lambda: rescale_adapter_scale(model, 0.5).__enter__(),
        lambda: layer.set_scale("default", 0.5),
        lambda: layer.scale_layer(2.0),
        lambda: layer.unscale_layer(0.5),
    )
    for change in changes:
        with pytest.raises(ValueError, match=r"there is no factor .*or LRQATConfig"):
            change()
    layer.set_scale("default", 1)
    layer.scale_layer(1.0)
    layer.unscale_layer()
    assert torch.equal(logits(copy.deepcopy(model), IDS), expected)
