"""How many integers a short DPO training changes, by learning rate and method.

    python benchmarks/dpo_rates.py --out benchmarks/results/dpo_rates.json       # a CPU, two minutes

Twenty steps of TRL's DPOTrainer at a constant rate on a small random Llama, 4 bits in groups of 64 (LR-QAT: its default
rank). The integers are those that merging stores, before and after.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import provenance, write_json
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from peft_lrqat import LowBitSRConfig, LRQATConfig

METHODS = {"LR-QAT": LRQATConfig, "low-bit SR": LowBitSRConfig}
RATES = (1e-6, 1e-5, 1e-4, 1e-3)
WORDS = 90


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(WORDS))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def preferences(rows: int) -> Dataset:
    def counted(start: int) -> str:
        return " ".join(f" w{(start + i) % WORDS}" for i in range(8))

    return Dataset.from_list(
        [{"prompt": counted(i), "chosen": counted(i + 8), "rejected": counted(i + 40)} for i in range(rows)]
    )


def integers(model: torch.nn.Module) -> list[torch.Tensor]:
    return [module.grid_tensor().codes for module in model.modules() if hasattr(module, "grid_tensor")]


def changed(method: str, rate: float, steps: int) -> tuple[int, int]:
    """How many integers differ after the training, and how many there are."""
    torch.manual_seed(0)
    words = tokenizer()
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape, **heads))
    model = get_peft_model(base, METHODS[method](bits=4, group_size=64, task_type="CAUSAL_LM"))
    before = integers(model)
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            folder,
            learning_rate=rate,
            lr_scheduler_type="constant",
            max_steps=steps,
            per_device_train_batch_size=4,
            report_to="none",
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = DPOTrainer(model, args=args, train_dataset=preferences(64), processing_class=words)
        trainer.train()
    trainer.model.set_adapter("default")
    after = integers(trainer.model)
    return sum(int((a != b).sum()) for a, b in zip(before, after, strict=True)), sum(a.numel() for a in before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    found: dict[str, dict[str, int]] = {}
    for method in METHODS:
        for rate in RATES:
            number, of = changed(method, rate, options.steps)
            found.setdefault(method, {})[f"{rate:g}"] = number
            print(f"{method:12} {rate:7.0e}  {number:9,} of {of:,} integers", flush=True)
    if options.out:
        write_json(options.out, {**provenance(), "steps": options.steps, "integers": of, "changed": found})


if __name__ == "__main__":
    main()
