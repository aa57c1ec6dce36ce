"""Float weights beside an adapter that are so coarse that nothing of them would be trained are warned of."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tests.models import tiny, tokens


def said(model: nn.Module, lr: float, kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> list[str]:
    """What two steps warn of."""
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        optimizer.step()
        optimizer.step()
    return [str(one.message) for one in found if "rounded away" in str(one.message)]


def made(method: ModuleType, save: list[str], dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    config = method.config(modules_to_save=save, task_type="CAUSAL_LM")
    return get_peft_model(tiny(dtype=dtype, num_hidden_layers=1), config, **options)


def test_norms_in_bf16_are_said_once(method: ModuleType):
    """Half of what lies between 1 and the next number below it is 1/512."""
    (warned,) = said(made(method, ["norm"], autocast_adapter_dtype=False), 1e-3)
    assert "norm' is trained in bfloat16 at a learning rate of 0.001, and 100% of its numbers" in warned
    assert "dtype=torch.float32" in warned


def test_a_model_that_transformers_manages(method: ModuleType):
    model = tiny(dtype=torch.bfloat16, num_hidden_layers=1)
    model.add_adapter(method.config(modules_to_save=["norm"]))
    assert len(said(model, 1e-3)) == 1


def test_a_head_in_bf16(method: ModuleType):
    (warned,) = said(made(method, ["lm_head"]), 1e-5)
    assert "'lm_head' is trained in bfloat16" in warned
    assert not said(made(method, ["lm_head"]), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_as_they_come_are_not_said(method: ModuleType, dtype: torch.dtype):
    assert not said(made(method, ["norm"], dtype), 1e-5)


def test_a_rule_whose_updates_are_of_another_size_is_not_looked_at(method: ModuleType):
    model = made(method, ["norm"], autocast_adapter_dtype=False)
    assert not said(model, 1e-3, torch.optim.SGD)
