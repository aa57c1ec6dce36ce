"""Names in the model and in its files, and what transformers does while it loads; for whole models:
tests/test_architectures.py."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    KimiLinearConfig,
    KimiLinearForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    NomicBertConfig,
    NomicBertModel,
)

from peft_lrqat.checkpoint.open import open_source
from peft_lrqat.formats.compressed_tensors import loading_problem, quantization_config
from peft_lrqat.grid import Grid
from peft_lrqat.modules.architecture import (
    float_names,
    loaded_modules,
    loading,
    module_names,
    skeleton_of,
    tensor_names,
)
from peft_lrqat.modules.experts import is_stacked
from tests.architectures import ARCHITECTURES
from tests.models import adapted

STORED = (Grid(4, 8), 4, None)
LLAVA = {
    "model.language_model.layers.0.mlp.up_proj": "language_model.model.layers.0.mlp.up_proj",
    "model.vision_tower.encoder.layers.1.mlp.fc1": "vision_tower.encoder.layers.1.mlp.fc1",
    "lm_head": "language_model.lm_head",
}


def test_modules_of_a_model_have_other_names_in_its_files_and_back():
    model = ARCHITECTURES["Llava"].build()
    assert module_names(model, LLAVA) == LLAVA
    assert loaded_modules(model, LLAVA.values()) == {file: inside for inside, file in LLAVA.items()}
    # files that were saved under the model's own names are loaded as well
    assert loaded_modules(model, LLAVA) == {inside: inside for inside in LLAVA}


def test_what_is_cut_or_joined_has_no_name():
    model = ARCHITECTURES["Mixtral"].build()
    names = tensor_names(model, dict(model.named_parameters()))
    assert names["model.layers.0.mlp.experts.down_proj"] is None
    assert names["model.layers.0.mlp.gate.weight"] == "model.layers.0.block_sparse_moe.gate.weight"


def test_float_layers_are_named_as_in_the_file_and_as_in_the_model():
    model = ARCHITECTURES["Mixtral"].build()
    found = float_names(model, dict(model.named_modules()), {"model.layers.0.self_attn.q_proj"})
    attention = [f"model.layers.0.self_attn.{part}_proj" for part in "kvo"]
    routers = ["model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"]  # no nn.Linear in transformers
    assert sorted(found) == sorted([*attention, *routers, "lm_head"])


@pytest.mark.parametrize(
    ("name", "early", "joins", "cuts", "experts"),
    [
        ("Llama", False, False, False, False),
        ("T5", True, False, False, False),  # reads weights when it is initialized
        ("BART", True, False, False, False),  # `generate` runs its encoder before it
        ("CLIP", True, False, False, False),
        ("Mixtral", False, True, False, True),
        ("gpt-oss", False, False, False, True),
        ("DINOv2", True, False, True, False),
    ],
)
def test_what_transformers_does(name: str, early: bool, joins: bool, cuts: bool, experts: bool):
    model = ARCHITECTURES[name].build()
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    found = loading(skeleton_of(model), linears)
    assert (found.early, found.joins, bool(found.cuts), found.experts) == (early, joins, cuts, experts)
    assert all(module.weight is not None for module in map(model.get_submodule, linears))  # the model was left alone


KIMI = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_token": 2, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    "pad_token_id": 0,
}  # fmt: skip


def test_floats_that_are_joined_beside_experts_that_are_packed():
    """transformers takes whatever it joins for quantized, and would drop the weights of these convolutions."""
    with torch.device("meta"):
        model = KimiLinearForCausalLM(KimiLinearConfig(**KIMI))
    experts = [f"{name}.0.w1" for name, module in model.named_modules() if is_stacked(module)]
    found = loading(skeleton_of(model), experts)
    assert found.joined == "model.layers.0.self_attn.conv1d.weight"
    assert "takes whatever it joins" in loading_problem([], found)
    assert "floats_to_join" not in quantization_config([], {experts[0]: STORED}, found)["config_groups"]
    found = loading(skeleton_of(model), ["model.layers.0.self_attn.q_proj"])
    assert not loading_problem([], found)  # if the experts are floats as well
    assert "floats_to_join" in quantization_config([], {"lm_head": STORED}, found)["config_groups"]


def test_experts_that_transformers_replaces_in_such_checkpoints():
    config = Llama4TextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, head_dim=8, num_local_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = Llama4ForCausalLM(config)
    found = loading(skeleton_of(model), ["model.layers.0.self_attn.q_proj"])
    assert "Llama4TextExperts under other names, and leaves these modules random" in loading_problem([], found)


def test_layers_that_files_join_are_named_when_they_are_exported():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = NomicBertModel(NomicBertConfig(vocab_size=96, **sizes))
    assert module_names(model, ["layers.0.self_attn.q_proj"]) == {"layers.0.self_attn.q_proj": None}
    with pytest.raises(ValueError, match=r"q_proj' joined with other layers, or cut.*save_pretrained"):
        open_source(adapted(model, task_type=None))
