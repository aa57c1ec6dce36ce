"""Several adapters, and what merging does beyond common/test_layer.py."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_lrqat.modules.packed import QuantizedLinear
from peft_lrqat.rounding import stream_key
from tests.lowbit_sr import IDS, layers, other, random_adapter
from tests.models import logits, tiny, train

# -- several adapters


def test_adapters_lie_side_by_side(base: PreTrainedModel):
    model = random_adapter(base)
    one = logits(model, IDS)
    model.add_adapter("second", other())
    assert torch.equal(logits(model, IDS), one)
    model.set_adapter("second")
    two = logits(model, IDS)
    assert not torch.equal(two, one)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if n.endswith("lowbitsr_weight.second.weight")
    }
    train(model, IDS, steps=2)
    model.set_adapter("default")
    assert torch.equal(logits(model, IDS), one)
    model.delete_adapter("second")
    assert "second" not in "".join(model.state_dict())
    model.add_adapter("second", other())
    assert torch.equal(logits(model, IDS), one)


def test_adapters_of_a_layer_round_apart_and_the_first_as_before(base: PreTrainedModel):
    model = random_adapter(base)
    model.add_adapter("second", other())
    both = {name: layer for name, layer in layers(model).items() if "second" in layer.lowbitsr_weight}
    assert both
    for name, layer in both.items():
        one, two = (layer.lowbitsr_weight[adapter].weight.stream for adapter in ("default", "second"))
        assert int(one[0]) == stream_key(0, name.removeprefix("base_model.model."))
        assert int(two[0]) != int(one[0])


def test_two_adapters_of_a_layer_cannot_be_active_together(base: PreTrainedModel):
    model = random_adapter(base)
    model.add_adapter("second", other())
    before = logits(model, IDS)
    with pytest.raises(ValueError, match=r"\['default', 'second'\] are sets of integers for the same layer"):
        model.base_model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default"]
    with pytest.raises(ValueError, match="the sum of two is on no grid"):
        model.merge_adapter(["default", "second"])
    with pytest.raises(ValueError, match="weighted sum is on no grid"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mix")
    assert torch.equal(logits(model, IDS), before)


def test_adapters_of_different_layers_can_be_active_together(base: PreTrainedModel):
    model = random_adapter(base, target_modules=["q_proj"])
    model.add_adapter("second", other(target_modules=["up_proj"]))
    model.base_model.set_adapter(["default", "second"])
    together = logits(model, IDS)
    assert torch.equal(logits(model.merge_and_unload(), IDS), together)


# -- merging


def test_layers_that_the_merged_adapter_does_not_have_are_quantized_too(base: PreTrainedModel):
    model = random_adapter(base)
    model.add_adapter("second", other())
    model.set_adapter("second")
    expected = logits(model, IDS)
    merged = model.merge_and_unload()
    assert sum(isinstance(m, QuantizedLinear) for m in merged.modules()) == 14
    assert torch.equal(logits(merged, IDS), expected)


def test_safe_merge_refuses_what_is_not_finite(base: PreTrainedModel):
    model = random_adapter(base)
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    next(iter(layers(model).values())).lowbitsr_weight["default"].weight.scale[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)


def test_conv1d_layers_train_and_merge_densely():
    model = random_adapter(tiny("gpt2"), target_modules=["c_attn", "c_fc"])
    before = logits(model, IDS)
    losses = train(model, IDS, steps=20, lr=1e-2)
    assert losses[-1] < losses[0] - 0.1
    trained = logits(model, IDS)
    assert not torch.equal(trained, before)
    with pytest.warns(UserWarning, match="cannot pack Conv1D"):
        merged = model.merge_and_unload()
    assert isinstance(merged.transformer.h[0].attn.c_attn, Conv1D)
    torch.testing.assert_close(logits(merged, IDS), trained, rtol=1e-5, atol=1e-5)
