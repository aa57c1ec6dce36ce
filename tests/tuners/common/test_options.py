"""Options of merging belong to an adapter, and a question about them changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from peft_lrqat import can_export, export
from peft_lrqat.checkpoint.model_source import ModelSource
from peft_lrqat.modules.packed import QuantizedLinear
from tests.models import logits, tiny

WIDE = {"default": 4, "wide": 8}


@pytest.fixture
def model(method: ModuleType, base: PreTrainedModel) -> PeftModel:
    """Two adapters with containers of their own: `default` has all layers, `wide` some."""
    model = method.random_adapter(base)
    model.add_adapter("wide", method.other(container_bits=8))
    return model.eval()


def containers(model: torch.nn.Module) -> dict[str, int]:
    return {name: m.bits for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def state(method: ModuleType, model: PeftModel) -> dict[str, dict]:
    return {name: dict(vars(layer)) for name, layer in method.layers(model).items()}


@pytest.mark.parametrize("first", WIDE)
def test_merging_takes_the_options_of_the_adapter_whatever_was_asked_before(
    method: ModuleType, model: PeftModel, first: str
):
    second = next(name for name in WIDE if name != first)
    model.set_adapter(first)
    before = state(method, model)
    assert can_export(model)
    assert {info.container_bits for info in ModelSource(model).grids().values()} == {WIDE[first]}
    assert state(method, model) == before
    for name in (second, first):
        model.set_adapter(name)
        model.merge_adapter()
        assert set(containers(model).values()) == {WIDE[name]}
        assert len(containers(model)) == 14
        model.unmerge_adapter()


@pytest.mark.parametrize("name", WIDE)
def test_layers_without_the_adapter_take_the_models_options(
    method: ModuleType, model: PeftModel, name: str, tmp_path: Path
):
    model.set_adapter(name)
    expected = logits(model, method.IDS)
    source = ModelSource(model)
    asked = {key: info.container_bits for key, info in source.grids().items()}
    before = state(method, model)
    export(model, tmp_path / "out", progress=False)
    assert state(method, model) == before
    merged = copy.deepcopy(model).merge_and_unload()
    assert containers(merged) == asked
    assert set(asked.values()) == {WIDE[name]}
    assert len(asked) == 14
    assert torch.equal(logits(merged, method.IDS), expected)


def test_options_go_with_their_adapter(method: ModuleType, model: PeftModel):
    layers = [layer for layer in method.layers(model).values() if "wide" in layer.adapter_options]
    assert len(layers) == 4
    model.delete_adapter("wide")
    assert all(layer.adapter_options.keys() == {"default"} for layer in layers)
    model.add_adapter("wide", method.other(container_bits=6))
    model.set_adapter("wide")
    model.merge_adapter()
    assert set(containers(model).values()) == {6}


def test_adapters_without_a_peft_model_keep_theirs(method: ModuleType):
    model = tiny()
    model.add_adapter(method.other(container_bits=8), "mine")
    assert {info.container_bits for info in ModelSource(model).grids().values()} == {8}


def test_without_adapters_nothing_says_how_to_merge(method: ModuleType, model: PeftModel):
    for name in WIDE:
        model.delete_adapter(name)
    with pytest.raises(ValueError, match=r"No adapter is left.*call `unload\(\)`"):
        next(iter(method.layers(model).values())).info_for()
