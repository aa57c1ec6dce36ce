"""Briefly trained models of every kind that a source reads."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.models import adapted, low_bit, tiny, tokens, train


def trained(kind: str, base: Path | None = None):
    """An adapted, briefly trained model; its base saved in `base`, so that the adapter can be loaded from a folder."""
    torch.manual_seed(0)
    family = {"gpt2": "gpt2", "bitnet": "llama", "tied": "llama"}.get(kind, "qwen2")
    model = tiny(family, dtype=torch.bfloat16, tie=kind in ("tied", "tokens"), num_hidden_layers=1)
    if base is not None:
        model.save_pretrained(base)
        model.name_or_path = str(base)
    options = {
        "asymmetric": {"bits": 3, "group_size": 8, "symmetric": False, "container_bits": 4},
        "tied": {"bits": 2, "group_size": 0, "container_bits": 4},
        "head": {"modules_to_save": ["lm_head"], "exclude_modules": ["o_proj"]},
        "tokens": {"trainable_token_indices": [3, 5]},
        "gpt2": {"group_size": 8},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "ternary": {"bits": 1.58, "forward": "low_bit"},
        "projected": {"bits": 8, "forward_bits": 1.58, "forward": "low_bit", "learn_scales": True},
        "int8": {"bits": 4, "act_bits": 8, "forward": "low_bit"},
        "w4a8": {"bits": 4, "act_bits": 8},
        "bitnet": {"bits": 1.58, "group_size": 0, "act_bits": 8, "forward": "low_bit"},
    }[kind]
    make = low_bit if options.pop("forward", None) else adapted
    model = make(model, **options)
    train(model, tokens())
    return model
