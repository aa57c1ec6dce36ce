"""What PEFT users do: biases, base weights, status, injection."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
from peft import (
    PeftMixedModel,
    PeftModel,
    get_base_model_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
)
from transformers import PreTrainedModel

from tests.models import logits, tiny, train

ATTENTION = ["q_proj", "v_proj"]


@pytest.mark.parametrize("bias", ["none", "only", "all"])
def test_bias_options(method: ModuleType, bias: str):
    named = method.ONLY if bias == "only" else bias
    model = method.adapt(tiny("qwen2"), **method.GRID, target_modules=["q_proj"], bias=named)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    train(model, method.IDS, steps=1)
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    expected = {"none": (), "only": ("q_proj",), "all": ("q_proj", "k_proj", "v_proj")}[bias]
    assert changed == {name for name in before if any(part in name for part in expected)}


def test_modules_to_save_and_trainable_tokens_train(method: ModuleType):
    model = method.adapt(tiny(), **method.GRID, modules_to_save=["lm_head"], trainable_token_indices=[3, 5])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, torch.tensor([[3, 5, 7, 9]]), steps=3)
    after = dict(model.named_parameters())
    for name in before:
        assert torch.equal(before[name], after[name]) != after[name].requires_grad, name
    assert any("modules_to_save" in n for n in before if after[n].requires_grad)
    assert any("trainable_tokens_delta" in n for n in before if after[n].requires_grad)


# -- the base under the adapters


def test_a_model_on_the_grid_is_not_changed_by_adapting_it(method: ModuleType, base: PreTrainedModel):
    before, state = logits(base, method.IDS), copy.deepcopy(base.state_dict())
    assert torch.equal(logits(method.adapt(copy.deepcopy(base), **method.GRID), method.IDS), before)
    model = method.random_adapter(base)
    assert not torch.equal(logits(model, method.IDS), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, method.IDS), before)
    found = get_base_model_state_dict(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    plain = model.unload()
    assert not method.layers(plain)
    assert {type(m) for m in plain.modules()} == {type(m) for m in tiny().modules()}
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_new_base_weights_are_converted_when_they_are_set(method: ModuleType, base: PreTrainedModel):
    second = method.adapt(tiny(seed=1), **method.GRID).unload()
    model = method.random_adapter(base)
    assert not set_base_model_state_dict(model, second.state_dict(), strict=True).missing_keys
    with model.disable_adapter():
        assert torch.equal(logits(model, method.IDS), logits(second, method.IDS))


# -- the rest of PEFT's surface


def test_status_functions_know_the_method(method: ModuleType, two_adapters: PeftModel):
    status = get_model_status(two_adapters)
    assert status.peft_types == {"default": method.TYPE, "other": method.TYPE}
    assert status.active_adapters == ["default"]
    assert status.num_adapter_layers == 14
    assert status.trainable_params == sum(p.numel() for p in two_adapters.parameters() if p.requires_grad)
    assert {s.module_type for s in get_layer_status(two_adapters)} == {method.LAYER}


def test_what_peft_closes_to_new_methods_is_refused_by_it(method: ModuleType, base: PreTrainedModel):
    with pytest.raises(ValueError, match=method.TYPE):
        get_peft_model(base, method.other(), mixed=True)
    with pytest.raises(ValueError, match=method.TYPE):
        PeftMixedModel(base, method.other())


def test_adapters_are_injected_into_plain_modules(method: ModuleType, base: PreTrainedModel):
    wrapped = method.random_adapter(copy.deepcopy(base), target_modules=ATTENTION)
    plain = inject_adapter_in_model(method.other(), base).eval()
    assert type(plain) is type(tiny())
    values = {key.removeprefix("base_model.model."): v for key, v in get_peft_model_state_dict(wrapped).items()}
    assert get_peft_model_state_dict(plain).keys() == values.keys()
    assert {key.split("proj.")[-1] for key in values if "proj." in key} == method.STORED


def test_transformers_own_adapter_methods(method: ModuleType, base: PreTrainedModel):
    before = logits(base, method.IDS)
    base.add_adapter(method.other(), "mine")
    assert len(method.layers(base)) == 4
    changed = logits(base.eval(), method.IDS)
    assert not torch.equal(changed, before)
    base.disable_adapters()
    assert torch.equal(logits(base, method.IDS), before)
    base.enable_adapters()
    assert torch.equal(logits(base, method.IDS), changed)
