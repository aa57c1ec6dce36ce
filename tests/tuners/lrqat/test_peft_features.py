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
from peft.utils.hotswap import hotswap_adapter
from transformers import PreTrainedModel

from peft_lrqat import LRQATConfig
from tests.lrqat import ATTENTION, GRID, IDS, layers, random_adapter
from tests.models import adapted, logits, tiny, train

# -- which modules


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, 12),
        ({"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}, 8),
        ({"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"}, 2),
        ({"target_modules": ATTENTION, "layers_to_transform": [1]}, 2),
        ({"target_modules": ATTENTION, "layers_to_transform": 0, "layers_pattern": "layers"}, 2),
        ({"target_modules": None}, 4),
        ({"target_modules": ["lm_head"]}, 1),
    ],
)
def test_modules_are_chosen_as_in_lora(options: dict, expected: int):
    found = layers(adapted(tiny(), **GRID, **options))
    assert len(found) == expected
    assert any("lm_head" in name for name in found) == (options["target_modules"] == ["lm_head"])


def test_rank_and_alpha_patterns():
    model = adapted(
        tiny(), **GRID, r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={r".*layers\.1\.mlp\..*": 1}
    )
    for name, layer in layers(model).items():
        assert layer.r["default"] == (2 if "q_proj" in name else 4)
        assert layer.lora_A["default"].weight.shape[0] == layer.r["default"]
        alpha = 1 if "layers.1.mlp" in name else 8
        assert layer.scaling["default"] == alpha / layer.r["default"]


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_bias_options(bias: str):
    model = adapted(tiny("qwen2"), **GRID, target_modules=["q_proj"], bias=bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    train(model, IDS, steps=1)
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    expected = {"none": (), "lora_only": ("q_proj",), "all": ("q_proj", "k_proj", "v_proj")}[bias]
    assert changed == {name for name in before if any(part in name for part in expected)}


def test_modules_to_save_and_trainable_tokens_train():
    model = adapted(tiny(), **GRID, modules_to_save=["lm_head"], trainable_token_indices=[3, 5])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.tensor([[3, 5, 7, 9]])
    train(model, ids, steps=3)
    after = dict(model.named_parameters())
    for name in before:
        assert torch.equal(before[name], after[name]) != after[name].requires_grad, name
    assert any("modules_to_save" in n for n in before if after[n].requires_grad)
    assert any("trainable_tokens_delta" in n for n in before if after[n].requires_grad)


def test_trainable_tokens_of_a_tied_model_act_on_both_ends():
    model = adapted(tiny(tie=True), **GRID, trainable_token_indices=[3, 5], ensure_weight_tying=True)
    train(model, torch.tensor([[3, 5, 7, 9]]))
    inner = model.base_model.model
    both = (inner.model.embed_tokens.token_adapter, inner.lm_head.token_adapter)
    assert torch.equal(both[0].get_merged_weights(["default"]), both[1].get_merged_weights(["default"]))
    assert torch.equal(logits(copy.deepcopy(model).merge_and_unload(), IDS), logits(model, IDS))


# -- the base under the adapters


def test_a_model_on_the_grid_is_not_changed_by_adapting_it(base: PreTrainedModel):
    before, state = logits(base, IDS), copy.deepcopy(base.state_dict())
    model = random_adapter(base)
    assert not torch.equal(logits(model, IDS), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), before)
    found = get_base_model_state_dict(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    plain = model.unload()
    assert not layers(plain)
    assert {type(m) for m in plain.modules()} == {type(m) for m in tiny().modules()}
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_new_base_weights_are_converted_when_they_are_set(base: PreTrainedModel):
    other = adapted(tiny(seed=1), **GRID).unload()
    model = random_adapter(base)
    result = set_base_model_state_dict(model, other.state_dict(), strict=True)
    assert not result.missing_keys
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), logits(other, IDS))


# -- the rest of PEFT's surface


def test_status_functions_know_the_method(two_adapters: PeftModel):
    status = get_model_status(two_adapters)
    assert (status.peft_types, status.active_adapters) == ({"default": "LRQAT", "other": "LRQAT"}, ["default"])
    assert status.num_adapter_layers == 14
    assert status.trainable_params == sum(p.numel() for p in two_adapters.parameters() if p.requires_grad)
    assert {s.module_type for s in get_layer_status(two_adapters)} == {"lrqat.LRQATLinear"}


def test_what_peft_closes_to_new_methods_is_refused_by_it(base: PreTrainedModel, tmp_path):
    with pytest.raises(ValueError, match="LRQAT"):
        get_peft_model(base, LRQATConfig(**GRID, target_modules=ATTENTION), mixed=True)
    with pytest.raises(ValueError, match="LRQAT"):
        PeftMixedModel(base, LRQATConfig(**GRID, target_modules=ATTENTION))
    model = random_adapter(base)
    model.save_pretrained(tmp_path)
    before = logits(model, IDS)
    with pytest.raises(ValueError, match="otswap"):
        hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(logits(model, IDS), before)


def test_adapters_are_injected_into_plain_modules(base: PreTrainedModel):
    wrapped = random_adapter(copy.deepcopy(base), target_modules=ATTENTION)
    config = LRQATConfig(**GRID, r=4, lora_alpha=32, target_modules=ATTENTION)
    plain = inject_adapter_in_model(config, base).eval()
    assert type(plain) is type(tiny())
    values = {key.removeprefix("base_model.model."): v for key, v in get_peft_model_state_dict(wrapped).items()}
    assert get_peft_model_state_dict(plain).keys() == values.keys()
    lazy = inject_adapter_in_model(config, tiny(), low_cpu_mem_usage=True)
    assert {value.device.type for value in get_peft_model_state_dict(lazy).values()} == {"meta"}


def test_transformers_own_adapter_methods(base: PreTrainedModel):
    before = logits(base, IDS)
    base.add_adapter(LRQATConfig(**GRID, target_modules=ATTENTION, init_lora_weights=False), "mine")
    assert len(layers(base)) == 4
    changed = logits(base.eval(), IDS)
    assert not torch.equal(changed, before)
    base.disable_adapters()
    assert torch.equal(logits(base, IDS), before)
    base.enable_adapters()
    assert torch.equal(logits(base, IDS), changed)
