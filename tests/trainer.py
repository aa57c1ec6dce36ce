"""What tests with Trainer and SFTTrainer need: data that a tiny model learns, arguments, a tokenizer."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from tests.models import VOCAB


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token id of `tests.models.tiny`."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def counting_text() -> Dataset:
    """Sentences that count upwards, which a tiny model learns in a few steps."""
    return Dataset.from_dict({"text": [" ".join(f"w{3 + (i + j) % 40}" for j in range(10)) for i in range(32)]})


def ids_dataset() -> Dataset:
    """The same as token ids and labels."""
    rows = [[3 + (i + j) % 40 for j in range(10)] for i in range(32)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def arguments(folder: Path, cls: type[TrainingArguments] = TrainingArguments, **options) -> TrainingArguments:
    """Six steps in fp32 on the CPU, silent, unless `options` say otherwise."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return cls(**{**settings, **options})


def losses(trainer: Trainer) -> list[float]:
    """The logged losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
