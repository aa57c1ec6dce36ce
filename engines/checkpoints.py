"""Make the checkpoints that are served: adapt SmolLM2, train a few steps, merge, save.

    python checkpoints.py FOLDER [name ...]

The text is Python's own documentation, as `pydoc` ships it. A few steps at a high learning rate are enough here: they
move scales and integers away from their starting values, so that what is served is a trained checkpoint.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from peft_lrqat import LowBitAdamW, LowBitSRConfig, LRQATConfig, create_lrqat_optimizer

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from smollm2 import load_smollm2
from specs import MIXTURES, SPECS, Spec

STEPS, LENGTH = 6, 128


def batches(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(STEPS, 1, LENGTH) token ids."""
    text = "\n\n".join(topics[name] for name in sorted(topics))[: STEPS * LENGTH * 8]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0, : STEPS * LENGTH]
    return ids.view(STEPS, 1, LENGTH)


def held_out(tokenizer: PreTrainedTokenizerBase, length: int = 480) -> list[int]:
    """Token ids of text after that of `batches`."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    start = STEPS * LENGTH * 8  # in characters: more than any token has
    return tokenizer(text[start : start + 8 * length])["input_ids"][:length]


@torch.no_grad()
def with_experts(dense: PreTrainedModel, count: int) -> PreTrainedModel:
    """A Mixtral that computes nearly what a Llama does: each expert is the Llama's MLP and a little noise (sparse
    upcycling, arXiv 2212.05055, with a random router)."""
    shared = dense.config.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
            "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    config = MixtralConfig(**{name: shared[name] for name in kept}, num_local_experts=count, num_experts_per_tok=1)
    state = {}
    for name, weight in dense.state_dict().items():
        before, found, part = name.partition(".mlp.")
        if not found:
            state[name] = weight
            continue
        new = {"gate_proj.weight": "w1", "up_proj.weight": "w3", "down_proj.weight": "w2"}[part]
        for e in range(count):
            noise = torch.randn_like(weight) * weight.float().std().to(weight.dtype) * 0.02
            state[f"{before}.block_sparse_moe.experts.{e}.{new}.weight"] = weight + noise
    for i in range(config.num_hidden_layers):
        router = torch.randn(count, config.hidden_size, dtype=dense.dtype) * 0.02
        state[f"model.layers.{i}.block_sparse_moe.gate.weight"] = router
    return MixtralForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dense.dtype)


def make(spec: Spec, folder: Path) -> None:
    torch.manual_seed(0)
    base, tokenizer = load_smollm2(torch.float32 if spec.experts else torch.bfloat16)  # many CPUs are slow in bf16
    if spec.experts:
        base = with_experts(base, spec.experts)
    common: dict[str, Any] = {
        "bits": spec.bits,
        "group_size": spec.group_size,
        "act_bits": spec.act_bits,
        "act_rule": spec.act_rule,
        "signed_scales": spec.signed_scales,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    if spec.experts:
        common["range_method"] = "minmax"  # the search would take most of the time
    optimizer: torch.optim.Optimizer
    if spec.bits == 1.58:
        model = get_peft_model(base, LowBitSRConfig(**common))
        optimizer = LowBitAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    else:
        config = LRQATConfig(**common, symmetric=spec.symmetric, container_bits=spec.container_bits)
        model = get_peft_model(base, config)
        optimizer = create_lrqat_optimizer(model, lr=4e-3)
    model.train()
    losses = []
    for ids in batches(tokenizer)[: 2 if spec.experts else STEPS]:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    merged = model.merge_and_unload().to(getattr(torch, spec.stored))  # exact for the integers and the scales
    shutil.rmtree(folder, ignore_errors=True)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{spec.name}: loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps", flush=True)


if __name__ == "__main__":
    names = sys.argv[2:]
    for spec in (*SPECS, *MIXTURES):
        if spec.name in names or not (names or spec.experts):
            make(spec, Path(sys.argv[1]) / spec.name)
