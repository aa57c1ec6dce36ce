"""accelerate may not take the integers of a base away: it is told so at once, and everything is still there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from torch import nn

from tests import lowbit_sr
from tests.models import logits, tiny, tokens

IDS = tokens()
CPU = torch.device("cpu")
SAYS = r"accelerate offloads this model.*remove_hook_from_module.*offload_base=True.*merge_and_unload"


def dispatched(model: nn.Module) -> nn.Module:
    """With hooks that take nothing away."""
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": lambda model, folder: cpu_offload(model, CPU),
    "disk": lambda model, folder: disk_offload(model, str(folder), CPU),
    "dispatched before": lambda model, folder: cpu_offload(dispatched(model), CPU),
}


@pytest.mark.parametrize(
    ("way", "inner"), [("cpu", False), ("disk", False), ("cpu", True), ("dispatched before", True)]
)
def test_offloading_an_adapted_model_is_refused_when_it_is_asked_for(
    method: ModuleType, way: str, inner: bool, tmp_path: Path
):
    model = method.random_adapter(tiny())
    given = model.base_model.model if inner else model  # accelerate cannot hook a PeftModel twice
    before = logits(model, IDS)
    with pytest.raises(ValueError, match=SAYS):
        WAYS[way](given, tmp_path)
    assert not any(p.is_meta for layer in method.layers(model).values() for p in layer.parameters())
    remove_hook_from_module(given, recurse=True)
    assert torch.equal(logits(model, IDS), before)
    assert torch.isfinite(model(input_ids=IDS, labels=IDS).loss)


def test_so_it_is_where_the_base_was_dropped():
    model = lowbit_sr.adapt(tiny(), keep_base=False)
    with pytest.raises(ValueError, match=SAYS):
        cpu_offload(model, CPU)


def test_hooks_that_take_nothing_away_are_welcome(method: ModuleType):
    model = method.random_adapter(tiny())
    before = logits(model, IDS)
    dispatched(model)
    assert any(hasattr(module, "_hf_hook") for layer in method.layers(model).values() for module in layer.modules())
    assert torch.equal(logits(model, IDS), before)


def test_what_merging_leaves_can_be_offloaded(method: ModuleType):
    merged: nn.Module = method.random_adapter(tiny()).merge_and_unload()
    before = logits(merged, IDS)
    assert torch.equal(logits(cpu_offload(merged, CPU), IDS), before)


def test_nor_while_adapters_are_merged_in_place(method: ModuleType):
    model = method.random_adapter(tiny())
    before = logits(model, IDS)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"accelerate moves this model.*merge_and_unload.*unmerge_adapter"):
        cpu_offload(model, CPU)
    remove_hook_from_module(model, recurse=True)
    model.unmerge_adapter()
    assert torch.equal(logits(model, IDS), before)
