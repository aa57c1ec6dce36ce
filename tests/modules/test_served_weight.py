"""A parameter without storage: what reading, writing, moving and copying it gives."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from peft_lrqat.grid import Grid
from peft_lrqat.modules.packed import QuantizedLinear, merged_layer
from peft_lrqat.modules.served_weight import ServedWeight
from tests.grids import random_tensor


def shows() -> QuantizedLinear:
    layer: QuantizedLinear = merged_layer(random_tensor(Grid(4, 8), 6, 16), None, 4, torch.bfloat16)
    layer.show_weight()
    return layer


@pytest.fixture
def layer() -> QuantizedLinear:
    return shows()


@pytest.fixture
def shown(layer: QuantizedLinear) -> nn.Parameter:
    return dict(layer.named_parameters())["weight"]


def test_it_describes_the_float_weight(layer: QuantizedLinear, shown: nn.Parameter):
    assert isinstance(shown, nn.Parameter)
    assert (shown.shape, shown.dtype, shown.requires_grad) == (layer.weight.shape, torch.bfloat16, False)
    assert "weight" not in layer.state_dict()
    layer.show_weight(transposed=True)
    turned = dict(layer.named_parameters())["weight"]
    assert turned.shape == shown.shape[::-1]
    assert torch.equal(turned.data, layer.weight.t())
    assert turned.data.is_contiguous()
    layer.hide_weight()
    assert not dict(layer.named_parameters())


def test_every_reading_is_a_plain_dense_tensor(layer: QuantizedLinear, shown: nn.Parameter):
    weight, x = layer.weight.detach().as_subclass(torch.Tensor), torch.randn(2, layer.in_features).bfloat16()
    for read in (shown.data, shown.detach(), shown.full_tensor(), shown.clone(), shown[:]):
        assert type(read) is torch.Tensor
        assert torch.equal(read, weight)
        assert read.data_ptr()
    assert torch.equal(nn.functional.linear(x, shown), nn.functional.linear(x, weight))
    assert torch.equal(torch.empty_like(weight).copy_(shown), weight)
    assert torch.equal(shown.to(torch.float32), weight.float())
    # as TRL does with a parameter that FSDP2 has offloaded
    assert type(shown.to("cpu").full_tensor()) is torch.Tensor
    assert torch.equal(shown.to("cpu").full_tensor(), weight)


def test_a_copy_or_a_pickle_of_it_alone_is_dense(layer: QuantizedLinear, shown: nn.Parameter):
    stream = io.BytesIO()
    torch.save({"weight": shown}, stream)
    stream.seek(0)
    for again in (copy.deepcopy(shown), torch.load(stream)["weight"]):
        assert type(again) is nn.Parameter
        assert torch.equal(again, layer.weight)


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.zero_(),
        lambda p: p.add_(1),
        lambda p: p.copy_(torch.zeros(p.shape)),
        lambda p: setattr(p, "data", torch.zeros(p.shape)),
        lambda p: torch.mul(p.data, 2, out=p),
        lambda p: torch._foreach_add_([p], 1),
    ],
)
def test_writing_is_refused(layer: QuantizedLinear, shown: nn.Parameter, write):
    with pytest.raises(RuntimeError, match="built from packed integers"):
        write(shown)


def test_it_does_not_keep_its_layer():
    shown = dict(shows().named_parameters())["weight"]
    assert isinstance(shown, ServedWeight)
    assert "ServedWeight(" in repr(shown)
    with pytest.raises(RuntimeError, match="unmerged by now"):
        _ = shown.data
