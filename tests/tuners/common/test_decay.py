"""Weight decay of fixed scales of inputs, which would pull them towards 1, is said once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer

from peft_lrqat import LowBitAdamW, calibrate_activations, create_lrqat_optimizer
from tests.models import adapted, low_bit, tiny, tokens
from tests.trainer import arguments


def said(make: Callable, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer], **config) -> list[str]:
    """What two steps warn of."""
    settings = {"bits": 4, "act_bits": 8, "act_scale": "static", **config}
    model = make(tiny(num_hidden_layers=1), **settings)
    if settings["act_scale"] == "static":
        calibrate_activations(model, [tokens(seed=3)])
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer = make_optimizer(model)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        optimizer.step()
        optimizer.step()
    return [str(one.message) for one in found if "weight_decay" in str(one.message)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(("make", "kind"), [(adapted, torch.optim.AdamW), (low_bit, LowBitAdamW)])
def test_weight_decay_of_fixed_scales_is_said(make, kind, tmp_path: Path):
    (warned,) = said(make, lambda model: Trainer(model, arguments(tmp_path, weight_decay=0.1)).create_optimizer())
    assert "`weight_decay` is 0.1 for the fixed scales of inputs" in warned
    assert len(said(make, lambda model: kind(trained(model), lr=1e-3, weight_decay=0.1))) == 1


@pytest.mark.parametrize(("make", "kind"), [(adapted, torch.optim.AdamW), (low_bit, LowBitAdamW)])
def test_nothing_is_said_where_they_have_none(make, kind):
    assert not said(make, lambda model: kind(trained(model), lr=1e-3, weight_decay=0.0))
    assert not said(make, lambda model: kind(trained(model), lr=1e-3, weight_decay=0.1), act_scale="dynamic")


def test_create_lrqat_optimizer_gives_them_none():
    assert not said(adapted, lambda model: create_lrqat_optimizer(model, lr=1e-3, weight_decay=0.1))
