"""Bad input: an error that says what to do, before anything is changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, LoraRuntimeConfig, get_peft_model
from torch import nn

from peft_lrqat import LRQATConfig
from tests import lowbit_sr
from tests.lrqat import config
from tests.models import adapted, logits, tiny, tokens
from tests.refusals import refused

IDS = tokens()


def test_a_ternary_base_is_said_to_be_one():
    says = "The base model is quantized to ternary weights.*LR-QAT's grids have 2 to 8 bits.*LowBitSRConfig"
    ternary = {"bits": 1.58, "group_size": 0}
    model = lowbit_sr.adapt(tiny(), **ternary).merge_and_unload()
    before = logits(model, IDS)
    for options in ({}, {"bits": 2}):
        with pytest.raises(ValueError, match=says):
            get_peft_model(model, LRQATConfig(task_type="CAUSAL_LM", **options))
    assert torch.equal(logits(lowbit_sr.adapt(model, **ternary, init_weights=True), IDS), before)  # as it advises


# -- configurations


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 1}, "`bits` is 1; it must be an integer from 2 to 8"),
        ({"bits": 9}, "`bits` is 9"),
        ({"bits": 4.0}, "`bits` is 4.0"),
        ({"downcast": "int4"}, "`downcast` is 'int4'; allowed are 'fx8'"),
        ({"bits": 8, "downcast": "fx8"}, "Use 'int'"),
        ({"act_bits": 8, "group_size": -1, "symmetric": False}, "`act_bits` is 8 with `symmetric=False`"),
        ({"signed_scales": True, "symmetric": False}, "`signed_scales` is True with `symmetric=False`"),
        ({"lora_dropout": 0.1}, "`lora_dropout` is 0.1"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` is 'pissa'; LR-QAT knows True, False and 'loftq'"),
        ({"init_lora_weights": "gaussian"}, "`init_lora_weights` is 'gaussian'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 4}}, "only 1 is supported"),
        ({"use_dora": True}, "`use_dora`"),
        ({"lora_bias": True}, "`lora_bias`"),
        ({"layer_replication": [(0, 2)]}, "`layer_replication`"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "`target_parameters`"),
        ({"use_qalora": True}, "`use_qalora`"),
        ({"alora_invocation_tokens": [1]}, "`alora_invocation_tokens`"),
        ({"r": -1}, "`r` is -1; a rank must be an integer, 0 or more"),
        ({"r": True}, "`r` is True"),
        ({"r": 4.0}, "`r` is 4.0"),
        ({"lora_alpha": 0}, "`lora_alpha` is 0; it must be a positive number"),
        ({"lora_alpha": "16"}, "`lora_alpha` is '16'"),
        ({"rank_pattern": {"q_proj": -3}}, r"`rank_pattern\['q_proj'\]` is -3"),
        ({"rank_pattern": {"q_proj": "8"}}, r"`rank_pattern\['q_proj'\]` is '8'"),
        ({"rank_pattern": [3]}, "`rank_pattern` is .3.; it must be a dictionary"),
        (
            {"rank_pattern": {"(": 3}},
            r"`rank_pattern` is \{'\(': 3\}; it must be a dictionary from patterns of names, which are regular",
        ),
        ({"alpha_pattern": {"q_proj": float("nan")}}, r"`alpha_pattern\['q_proj'\]` is nan"),
        ({"alpha_pattern": {"q_proj": None}}, r"`alpha_pattern\['q_proj'\]` is None"),
        ({"bias": "lowbitsr_only"}, "`bias` is 'lowbitsr_only'; allowed are 'none', 'all', 'lora_only'"),
        pytest.param(
            {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)},
            "`ephemeral_gpu_offload` is True, but torch finds no accelerator",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one"),
        ),
    ],
)
def test_options_out_of_range_or_of_another_method(options: dict, match: str):
    model = tiny()
    with refused(model, match):
        get_peft_model(model, config(**options))


# -- base models


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_modules": ["act_fn"]}, "quantizes nn.Linear, Conv1D and nn.Embedding only"),
        (
            {"target_modules": ["embed_tokens"], "group_size": -1, "act_bits": 8},
            "`act_bits` is 8, but module 'model.embed_tokens' is an embedding",
        ),
        (
            {"target_modules": ["embed_tokens"], "trainable_token_indices": [3]},
            "'model.embed_tokens', which is quant",
        ),
    ],
)
def test_modules_that_cannot_be_converted(options: dict, match: str):
    model, own = tiny(), config(**options)
    with refused(model, match, config=own):
        get_peft_model(model, own)


def test_layers_of_ones_own_are_refused():
    model, own = tiny(), config()
    own._register_custom_module({nn.Linear: nn.Linear})
    with refused(model, "_register_custom_module"):
        get_peft_model(model, own)


def test_a_merged_model_is_not_rounded_to_another_grid():
    merged = adapted(tiny()).merge_and_unload()
    with refused(merged, "asks for group_size=8, but the base model is quantized with group_size=-1"):
        get_peft_model(merged, config())


def test_a_tied_table_is_refused():
    model = tiny(tie=True)
    with refused(model, "tied to 'lm_head'.*untie it first"):
        get_peft_model(model, config(target_modules=["embed_tokens"]))


# -- further adapters


def test_adapters_of_one_model_share_the_rounding_of_activations():
    model = adapted(tiny(), bits=4, group_size=-1)
    with pytest.raises(ValueError, match=r"share its converted base.*act_bits=8"):
        model.add_adapter("other", config(bits=4, group_size=-1, act_bits=8))


@pytest.mark.parametrize("option", [{"symmetric": False}, {"downcast": "int"}, {"signed_scales": False}])
def test_adapters_of_one_model_share_a_grid(option: dict):
    model = adapted(tiny(), bits=4, group_size=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"share its converted base.*{next(iter(option))}="):
        model.add_adapter("other", config(**option))
    assert list(model.peft_config) == ["default"]
    assert model.state_dict().keys() == before.keys()


def test_loftq_needs_the_float_weight():
    model = adapted(tiny())
    with pytest.raises(ValueError, match=r"needs the float weight.*first adapter"):
        model.add_adapter("other", config(group_size=-1, init_lora_weights="loftq"))


# -- adapter files


def test_weights_of_another_base_in_an_existing_adapter(folder: Path):
    # the Trainer's way of resuming: the adapter exists, and only values are loaded
    model = adapted(tiny(seed=1), bits=4, group_size=8, init_lora_weights=False).eval()
    before = logits(model, IDS)
    with pytest.raises(ValueError, match="trained on another base: its integers have the checksum"):
        model.load_adapter(folder, adapter_name="default")
    assert torch.equal(logits(model, IDS), before)


# -- merged layers


def test_a_merged_layers_weight_cannot_be_changed_in_place():
    merged = adapted(tiny()).merge_and_unload()
    layer = merged.model.layers[0].mlp.up_proj
    packed = layer.weight_packed.clone()
    with pytest.raises(RuntimeError, match="second rounding"):
        layer.weight.data += 1
    float_adapter = get_peft_model(merged, LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    with pytest.raises((RuntimeError, ValueError, AttributeError)):
        float_adapter.merge_adapter()
    assert torch.equal(layer.weight_packed, packed)


def test_ungathered_shards_are_not_saved_silently(tmp_path: Path):
    model = adapted(tiny(), target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight.data = torch.zeros(32)
    with pytest.warns(UserWarning, match="ZeRO-3 / FSDP shards"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("pattern", [{"rank_pattern": {"down_proj": -1}}, {"alpha_pattern": {"down_proj": "x"}}])
def test_patterns_that_were_set_after_the_checks(pattern: dict):
    model, own = tiny(), config()
    ((name, value),) = pattern.items()
    setattr(own, name, value)
    with refused(model, "(must be an integer, 0 or more|positive number)", Exception, own):
        get_peft_model(model, own)
    setattr(own, name, {})
    assert logits(get_peft_model(model, own), IDS).isfinite().all()


@pytest.mark.parametrize("value", ["no", "False", 0, 1])
def test_a_flag_is_true_or_false(value):
    with pytest.raises(ValueError, match="`symmetric` is"):
        config(symmetric=value)
