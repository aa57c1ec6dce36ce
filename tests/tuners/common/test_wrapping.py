"""Casting and copying an adapted model."""

from __future__ import annotations

import copy
import io
import pickle
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedModel

from tests.models import logits, tiny


def test_unloading_and_merging_follow_the_models_dtype(method: ModuleType, base: PreTrainedModel):
    model = method.random_adapter(base).to(torch.bfloat16)
    trained = logits(model, method.IDS)
    for plain in (copy.deepcopy(model).unload(), model.merge_and_unload()):
        assert {value.dtype for value in plain.state_dict().values() if value.is_floating_point()} == {torch.bfloat16}
        assert logits(plain, method.IDS).isfinite().all()
    assert torch.equal(logits(plain, method.IDS), trained)
    narrow = method.random_adapter(tiny(), scale_dtype="fp32").to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"cannot hold the scales.*`scale_dtype='fp32'`"):
        narrow.merge_and_unload()


def test_copies_and_pickles_compute_the_same(method: ModuleType, base: PreTrainedModel):
    model = method.random_adapter(base)
    expected = logits(model, method.IDS)
    assert torch.equal(logits(copy.deepcopy(model), method.IDS), expected)
    layer = next(iter(method.layers(model).values()))
    x = torch.randn(2, layer.in_features)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False), method.IDS), expected)


def test_layers_are_exported_by_torch_and_compute_the_same(method: ModuleType, base: PreTrainedModel):
    model = method.random_adapter(base)
    layers = [next(iter(method.layers(model).values()))]
    x = torch.randn(2, 3, layers[0].in_features)
    expected = layers[0](x)
    name = next(name for name, module in model.base_model.model.named_modules() if module is layers[0])
    layers.append(model.merge_and_unload().get_submodule(name))
    for layer in layers:
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), expected)
