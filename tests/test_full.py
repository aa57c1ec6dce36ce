"""The peers of benchmarks/full.py that step in backward train as those that step afterwards, and keep no gradient."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.models import tiny, tokens


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("full")


def trained(full: ModuleType, name: str) -> tuple[dict[str, torch.Tensor], int]:
    """The weights after three steps under checkpointing, and how many gradients the last backward left."""
    kind, options = full.METHODS[name]
    model = tiny().to(torch.bfloat16).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = full.full_model(kind, options, model, "lp")
    optimizer = full.full_optimizer(kind, options, [p for p in model.parameters() if p.requires_grad])
    for _ in range(3):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        held = sum(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {n: p.detach().clone() for n, p in model.named_parameters()}, held


def test_in_backward_is_the_same_training_without_gradients_that_wait(full: ModuleType):
    after, kept = trained(full, "full bf16, AdamW")
    during, none = trained(full, "full bf16, AdamW in backward")
    start = dict(tiny().to(torch.bfloat16).named_parameters())
    moved = [name for name in after if not torch.equal(after[name], start[name])]
    assert (len(moved), kept, none) == (14, 14, 0)
    assert all(torch.equal(after[name], during[name]) for name in after)


def test_a_method_whose_package_is_not_there_is_left_out(full: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(full.importlib.util, "find_spec", lambda name: None)
    lacking = {name: full.missing(*full.METHODS[name]) for name in full.METHODS}
    wanted = {name: package for name, package in lacking.items() if package}
    assert set(wanted.values()) == {"torchao", "bitsandbytes"}
    assert "full bf16, AdamW in backward" not in wanted
