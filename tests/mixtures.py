"""Tiny mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from peft_lrqat import LRQATConfig
from tests.models import VOCAB

EXPERTS, CHOSEN = 5, 2
#: How the experts of the first layer are called.
FIRST = "model.layers.0.mlp.experts"

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}


def mixture(dtype: torch.dtype = torch.float32, how: str = "grouped_mm", **overrides: Any) -> PreTrainedModel:
    """A random Qwen3-MoE in eval mode.

    Args:
        how: which of transformers' functions multiplies with experts.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**{**_SIZES, **overrides}), dtype=dtype).eval()
    model.set_experts_implementation(how)
    return model


_WIDE = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB, "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN, "max_position_embeddings": 128, "initializer_range": 0.1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS}),
    "qwen2_moe": ("Qwen2Moe", {"shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 32, "norm_topk_prob": True}),
    "olmoe": ("Olmoe", {"num_key_value_heads": 4}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
            "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32, "v_head_dim": 32, "n_shared_experts": 2,
        },
    ),
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)


def of_family(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random mixture in eval mode, whose widths divide by 32, and whose one-dimensional tensors are random too."""
    name, settings = _FAMILIES[family]
    config = getattr(transformers, name + "Config")(**{**_WIDE, **settings, **overrides})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() == 1 and "rotary" not in name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    return model


def on_experts(model: PreTrainedModel, **options: Any) -> PeftModel:
    """LR-QAT on all linear layers and experts, in groups of 8, with adapters that start away from the base."""
    settings = {"r": 2, "group_size": 8, "range_method": "minmax", "init_lora_weights": False}
    return get_peft_model(model, LRQATConfig(**{**settings, "task_type": "CAUSAL_LM", **options})).eval()
