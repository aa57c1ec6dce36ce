"""Tiny models of every family, inputs for them, and what they are when a process without the plugin loads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_lrqat import LowBitSRConfig, LRQATConfig
from tests.processes import run_clean

VOCAB = 96

_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", _DECODER),
    "mistral": ("Mistral", _DECODER),
    "qwen2": ("Qwen2", _DECODER),
    "qwen3": ("Qwen3", {**_DECODER, "head_dim": 8}),
    "gemma": ("Gemma", {**_DECODER, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_DECODER, "head_dim": 8}),
    "gemma3": ("Gemma3Text", {**_DECODER, "head_dim": 8}),
    "gpt2": (
        "GPT2",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        },
    ),
    "opt": (
        "OPT",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "dropout": 0.0,
        },
    ),
}
FAMILIES = tuple(_FAMILIES)


def tiny(
    family: str = "llama", *, dtype: torch.dtype = torch.float32, tie: bool = False, seed: int = 0, **overrides
) -> PreTrainedModel:
    """A random causal LM of some ten thousand weights, in eval mode, large enough to make a difference."""
    name, settings = _FAMILIES[family]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    # the default 0.02 makes a network of this width nearly linear in its embeddings
    settings = {"vocab_size": VOCAB, "tie_word_embeddings": tie, **special, **settings, **overrides}
    config = getattr(transformers, name + "Config")(**settings)
    for init in ("initializer_range", "init_std"):
        if hasattr(config, init):
            setattr(config, init, 0.1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # not model.to(dtype), which would round the rotary frequencies, as loading a checkpoint does not
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tokens(batch: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    """int64 (batch, length) token ids without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def adapted(model: PreTrainedModel, **config) -> PeftModel:
    """`model` with LR-QAT adapters on all linear layers; per output channel, as tiny layers have odd widths."""
    settings = {"r": 4, "lora_alpha": 32, "group_size": -1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LRQATConfig(**{**settings, **config}))


def low_bit(model: PreTrainedModel, **config) -> PeftModel:
    """`model` with trainable integers in all linear layers; per output channel, as tiny layers have odd widths."""
    settings = {"group_size": -1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if config.get("bits") in (2, 3, 4):
        settings["range_method"] = "minmax"  # the search takes most of a tiny model's conversion
    return get_peft_model(model, LowBitSRConfig(**{**settings, **config}))


def train(
    model: torch.nn.Module,
    ids: torch.Tensor,
    steps: int = 3,
    lr: float = 5e-2,
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> list[float]:
    """A few steps on one batch; returns the losses and leaves the model in eval mode."""
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


_LOAD = """
import json, torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
# transformers compiles BitNet's unpacking, which takes most of a minute and computes the same
torch.compiler.set_stance("force_eager")
job = json.load(open(sys.argv[1]))
ids = torch.tensor(job["ids"])
found = []
with torch.no_grad():
    for folder in job["folders"]:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        found.append(model(input_ids=ids).logits)
torch.save(found, job["out"])
"""


def reload_clean(folders: Sequence[Path], ids: torch.Tensor, work: Path) -> list[torch.Tensor]:
    """Logits of saved checkpoints, each loaded with plain transformers in one process that cannot import peft_lrqat.

    Args:
        folders: checkpoints of causal language models.
        work: an existing folder for the job's own two files.
    """
    job = {"ids": ids.tolist(), "folders": [str(folder) for folder in folders], "out": str(work / "logits.pt")}
    (work / "job.json").write_text(json.dumps(job))
    run_clean(_LOAD, str(work / "job.json"))
    return torch.load(work / "logits.pt")
