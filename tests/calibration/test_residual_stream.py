"""Decoders of many kinds, with experts too, compute what they did; all others are refused by name, unchanged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_lrqat import preprocess_rotation
from tests.models import logits, tokens

IDS = tokens()
_DECODER = {
    "vocab_size": 96, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_HEAD = {**_DECODER, "head_dim": 12}
_EXPERTS = {
    **_HEAD, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 20,
}  # fmt: skip
#: Rotated as wholes.
KNOWN: dict[str, dict[str, Any]] = {
    "Llama": _DECODER,
    "Mistral": _DECODER,
    "Qwen2": _DECODER,
    "Qwen3": _HEAD,
    "Gemma": {**_HEAD, "tie_word_embeddings": False},
    "Phi3": _DECODER,
    "Granite": {**_DECODER, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "Glm": {**_HEAD, "attention_bias": True},
    "Mixtral": _EXPERTS,
    "Qwen2Moe": {**_EXPERTS, "mlp_only_layers": [0]},
    "GptOss": {**_EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}
#: Their values can be rotated, their streams cannot; a part of the reason.
VALUES_ALONE: dict[str, tuple[dict[str, Any], str]] = {
    "Gemma2": (_HEAD, "'model.layers.0.pre_feedforward_layernorm.weight'.*normalized too"),
    "Gemma3Text": (_HEAD, "'model.layers.0.pre_feedforward_layernorm.weight'.*normalized too"),
    "Olmo2": (_DECODER, "has no 'input_layernorm'.*normalized too"),
    "Cohere": (_DECODER, r"model.norm \(CohereLayerNorm\) is no RMSNorm"),
    "Starcoder2": (_DECODER, r"model.norm \(LayerNorm\) is no RMSNorm"),
    "GraniteMoe": (_EXPERTS, "'model.layers.0.block_sparse_moe.router.*' does with the residual stream is not known"),
}
_UNKNOWN = {"GPT2": "GPT2LMHeadModel is not", "OPT": "OPTForCausalLM is not", "Mamba": "MambaForCausalLM is not"}


def build(name: str, fields: dict[str, Any]) -> PreTrainedModel:
    """A random model with gains and biases that are no ones and zeros."""
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**fields)).eval()
    for key, parameter in model.named_parameters():
        parameter.data.normal_(std=0.3 if parameter.ndim < 2 else 0.15).add_(1.0 if "norm" in key else 0.0)
    return model


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def same(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("name", KNOWN)
def test_outputs_stay_what_they_were(name: str):
    model = build(name, KNOWN[name])
    before, weights = logits(model, IDS), {key: value.clone() for key, value in model.state_dict().items()}
    preprocess_rotation(model, progressbar=False)
    assert relative(logits(model, IDS), before) < 1e-5
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])}
    attention = "qkv_proj" if name == "Phi3" else "v_proj"
    for part in ("embed_tokens", f"{attention}.weight", "o_proj.weight", "down_proj", "input_layernorm", "lm_head"):
        assert any(part in key for key in moved)
    assert not any("q_norm" in key or "k_norm" in key or "sinks" in key for key in moved)


@pytest.mark.parametrize("name", VALUES_ALONE)
def test_values_alone(name: str):
    fields, reason = VALUES_ALONE[name]
    model = build(name, fields)
    before, state = logits(model, IDS), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"(?s){reason}.*`residual=False`"):
        preprocess_rotation(model, progressbar=False)
    assert same(model, state)
    preprocess_rotation(model, residual=False, progressbar=False)
    assert relative(logits(model, IDS), before) < 1e-5
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    assert {key.split(".")[-2] for key in moved} == {"v_proj", "o_proj"}
    assert not hasattr(model.config, "tie_word_embeddings") or model.config.tie_word_embeddings == (
        model.lm_head.weight is model.model.embed_tokens.weight
    )


@pytest.mark.parametrize("name", _UNKNOWN)
def test_other_architectures_are_refused(name: str):
    small = {"num_hidden_layers": 1, "n_layer": 1, "hidden_size": 24, "vocab_size": 96, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**small))
    with pytest.raises(ValueError, match=_UNKNOWN[name]):
        preprocess_rotation(model, progressbar=False)


def test_values_that_are_clipped_or_mixed_are_refused():
    clipped = build("Olmoe", {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.1})
    with pytest.raises(ValueError, match=r"clip_qkv.*`values=False`"):
        preprocess_rotation(clipped, progressbar=False)
    preprocess_rotation(clipped, values=False, progressbar=False)
    mixed = build("DiffLlama", _DECODER)
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.lambda_q1' does with the values.*`values=False`"):
        preprocess_rotation(mixed, residual=False, progressbar=False)


def test_a_layer_norm_is_refused_in_every_dtype():
    """torch's takes inputs of its own dtype only."""
    model = build("Starcoder2", _DECODER).bfloat16()
    with pytest.raises(ValueError, match=r"model.norm \(LayerNorm\) is no RMSNorm"):
        preprocess_rotation(model, progressbar=False)
