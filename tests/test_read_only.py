"""Weights that are built for reading: whatever would be lost raises, and reading is as ever."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from peft_lrqat.grid import Grid
from peft_lrqat.modules.packed import merged_layer
from peft_lrqat.ops.activations import Activations
from peft_lrqat.read_only import ReadOnlyTensor
from peft_lrqat.tuners.common.frozen import FrozenWeight
from tests.grids import random_tensor


def values() -> torch.Tensor:
    return torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.zero_(),
        lambda t: t.add_(1),
        lambda t: t.__setitem__(0, 0),
        lambda t: t.__setitem__(t > 3, 0),
        lambda t: t[:, 1:][0].fill_(0),
        lambda t: t.data.mul_(2),
        lambda t: t.detach().view(-1).copy_(torch.zeros(12)),
        lambda t: setattr(t, "data", torch.zeros(3, 4)),
        lambda t: torch.add(t, 1, out=t),
        lambda t: torch._foreach_mul_([torch.ones(2), t], 2.0),
        lambda t: t.apply_(lambda _: 0.0),
        lambda t: t.map_(t, lambda *_: 0.0),
        lambda t: t.set_(torch.zeros(3, 4)),
        lambda t: nn.init.normal_(t),
    ],
)
def test_writing_raises(write):
    tensor = ReadOnlyTensor(values(), "It is made of glass.")
    with pytest.raises(RuntimeError, match=r"would be lost\. It is made of glass\."):
        write(tensor)
    assert torch.equal(tensor + 0, values())


def test_arrays_are_read_only_as_well():
    tensor = ReadOnlyTensor(values(), "It is made of glass.")
    for array in (tensor.numpy(), tensor[1:].numpy(), np.asarray(tensor)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert np.array_equal(tensor.t().numpy(), values().t().numpy())


def test_reading_gives_plain_tensors():
    tensor = ReadOnlyTensor(values(), "")
    x = torch.randn(2, 4, requires_grad=True)
    y = x @ tensor.t()
    assert type(y) is torch.Tensor
    assert torch.equal(y, x @ values().t())
    y.sum().backward()
    assert torch.equal(x.grad, values().sum(0).expand(2, 4))
    assert tensor.tolist() == values().tolist()
    assert tensor[1, 2].item() == 6
    for copied in (tensor.clone(), copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), tensor.double()):
        assert type(copied) is torch.Tensor
        copied.zero_()
    assert torch.equal(tensor + 0, values())


def merged(**options) -> nn.Module:
    grid = Grid(1.58, 0) if options.get("activations") == Activations("bitnet") else Grid(8, -1)
    return merged_layer(random_tensor(grid, 8, 16), None, 8, torch.float32, **options)


@pytest.mark.parametrize(
    "layer",
    [
        merged(),
        merged(activations=Activations("compressed-tensors")),
        merged(activations=Activations("bitnet")),
        FrozenWeight.of_floats(nn.Linear(16, 8), Grid(4, -1), "fx8"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_weights_of_quantized_layers_are(layer: nn.Module):
    before = layer.weight.clone()
    for write in (lambda w: w.zero_(), lambda w: w.data[0].zero_(), lambda w: setattr(w, "data", w.data + 1)):
        with pytest.raises(RuntimeError, match=r"would be lost.*built"), torch.no_grad():
            write(layer.weight)
    assert torch.equal(layer.weight, before)
