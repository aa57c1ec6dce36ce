"""What PEFT users do: choosing modules, base weights, status, injection."""

from __future__ import annotations

import copy

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

from tests.lowbit_sr import ATTENTION, GRID, IDS, layers, other, random_adapter
from tests.models import logits, low_bit, tiny, train

# -- which modules


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, 12),
        ({"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"}, 2),
        ({"target_modules": ATTENTION, "layers_to_transform": [1]}, 2),
        ({"target_modules": ATTENTION, "layers_to_transform": 0, "layers_pattern": "layers"}, 2),
        ({"target_modules": None}, 4),
        ({"target_modules": ["lm_head"]}, 1),
    ],
)
def test_modules_are_chosen_as_in_lora(options: dict, expected: int):
    assert len(layers(low_bit(tiny(), **GRID, **options))) == expected


@pytest.mark.parametrize("bias", ["none", "lowbitsr_only", "all"])
def test_bias_options(bias: str):
    model = low_bit(tiny("qwen2"), **GRID, target_modules=["q_proj"], bias=bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    train(model, IDS, steps=1)
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    expected = {"none": (), "lowbitsr_only": ("q_proj",), "all": ("q_proj", "k_proj", "v_proj")}[bias]
    assert changed == {name for name in before if any(part in name for part in expected)}


def test_modules_to_save_and_trainable_tokens_train():
    model = low_bit(tiny(), **GRID, modules_to_save=["lm_head"], trainable_token_indices=[3, 5])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, torch.tensor([[3, 5, 7, 9]]), steps=3)
    for name, p in model.named_parameters():
        assert torch.equal(before[name], p) != p.requires_grad, name
    assert any("modules_to_save" in name for name in before)
    assert any("trainable_tokens_delta" in name for name in before)


def test_each_layer_has_a_random_stream_of_its_own():
    keys = [int(layer.lowbitsr_weight["default"].stream[0]) for layer in layers(low_bit(tiny(), **GRID)).values()]
    assert len(set(keys)) == len(keys) == 14
    again = [int(layer.lowbitsr_weight["default"].stream[0]) for layer in layers(low_bit(tiny(), **GRID)).values()]
    seeded = [int(la.lowbitsr_weight["default"].stream[0]) for la in layers(low_bit(tiny(), **GRID, seed=1)).values()]
    assert again == keys
    assert not set(seeded) & set(keys)


# -- the base under the adapters


def test_a_model_on_the_grid_is_not_changed_by_adapting_it(base: PreTrainedModel):
    before, state = logits(base, IDS), copy.deepcopy(base.state_dict())
    assert torch.equal(logits(low_bit(copy.deepcopy(base), **GRID), IDS), before)
    model = random_adapter(base)
    assert not torch.equal(logits(model, IDS), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), before)
    found = get_base_model_state_dict(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    plain = model.unload()
    assert {type(m) for m in plain.modules()} == {type(m) for m in tiny().modules()}
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_new_base_weights_are_converted_when_they_are_set(base: PreTrainedModel):
    second = low_bit(tiny(seed=1), **GRID).unload()
    model = random_adapter(base)
    assert not set_base_model_state_dict(model, second.state_dict(), strict=True).missing_keys
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), logits(second, IDS))


def test_delta_weights_are_how_far_training_went(base: PreTrainedModel):
    model = random_adapter(base)
    for layer in layers(model).values():
        moved = layer.lowbitsr_weight["default"].to_float() - layer.get_base_layer().weight
        assert moved.abs().max() > 0
        assert torch.equal(layer.get_delta_weight("default"), moved)


# -- a base that was dropped


def test_without_a_base_one_adapter_trains_merges_and_says_what_is_gone(base: PreTrainedModel, tmp_path):
    twin = random_adapter(copy.deepcopy(base), init_weights=True)
    model = random_adapter(base, init_weights=True, keep_base=False)
    assert train(model, IDS) == train(twin, IDS)
    trained = logits(model, IDS)
    gone = r"`keep_base=False` dropped the base codes"
    with model.disable_adapter(), pytest.raises(ValueError, match=gone):
        logits(model, IDS)
    with pytest.raises(ValueError, match=gone):
        model.unload()
    with pytest.raises(ValueError, match=r"`keep_base=False` dropped the base codes.*'second'"):
        model.add_adapter("second", other(keep_base=False))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match=r"`keep_base=False` dropped"):
        next(iter(layers(model).values())).get_delta_weight("default")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(low_bit(tiny(), **GRID).unload(), tmp_path)
    assert torch.equal(logits(again.eval(), IDS), trained)
    assert torch.equal(logits(model.merge_and_unload(), IDS), trained)


# -- the rest of PEFT's surface


def test_status_functions_know_the_method(two_adapters: PeftModel):
    status = get_model_status(two_adapters)
    assert (status.peft_types, status.active_adapters) == ({"default": "LOWBITSR", "other": "LOWBITSR"}, ["default"])
    assert status.num_adapter_layers == 14
    assert status.trainable_params == sum(p.numel() for p in two_adapters.parameters() if p.requires_grad)
    assert {s.module_type for s in get_layer_status(two_adapters)} == {"lowbitsr.LowBitSRLinear"}


def test_what_peft_closes_to_new_methods_is_refused_by_it(base: PreTrainedModel):
    with pytest.raises(ValueError, match="LOWBITSR"):
        get_peft_model(base, other(), mixed=True)
    with pytest.raises(ValueError, match="LOWBITSR"):
        PeftMixedModel(base, other())


def test_adapters_are_injected_into_plain_modules(base: PreTrainedModel):
    wrapped = random_adapter(copy.deepcopy(base), target_modules=ATTENTION)
    plain = inject_adapter_in_model(other(), base).eval()
    assert type(plain) is type(tiny())
    values = {key.removeprefix("base_model.model."): v for key, v in get_peft_model_state_dict(wrapped).items()}
    assert get_peft_model_state_dict(plain).keys() == values.keys()
    assert {key.rpartition(".")[2] for key in values} == {"lowbitsr_codes", "lowbitsr_scale", "lowbitsr_stream"}


def test_transformers_own_adapter_methods(base: PreTrainedModel):
    before = logits(base, IDS)
    base.add_adapter(other(), "mine")
    changed = logits(base.eval(), IDS)
    assert not torch.equal(changed, before)
    base.disable_adapters()
    assert torch.equal(logits(base, IDS), before)
    base.enable_adapters()
    assert torch.equal(logits(base, IDS), changed)
