"""Unmodified Trainer and SFTTrainer: the default optimizer trains, so does `LowBitAdamW`; runs resume bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_lrqat import LowBitAdamW, LowBitSRConfig
from peft_lrqat.tuners.lowbit_sr import LowBitTensor
from tests.models import logits, low_bit, tiny, tokens
from tests.trainer import arguments, ids_dataset, losses

IDS = tokens()
CONFIG = {"bits": 8, "group_size": -1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def codes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.codes() for name, p in model.named_parameters() if isinstance(p, LowBitTensor)}


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": False}])
def test_sft_trainer_with_default_arguments_trains(tmp_path: Path, tokenizer, text: Dataset, options: dict):
    trainer = SFTTrainer(
        model=tiny(),
        args=arguments(tmp_path, SFTConfig, max_steps=12, **options),
        train_dataset=text,
        processing_class=tokenizer,
        peft_config=LowBitSRConfig(**CONFIG),
    )
    assert trainer.args.optim == "adamw_torch_fused"
    before = codes(trainer.model)
    floats = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if n not in before}
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0], losses(trainer)
    after = codes(trainer.model)
    assert len(before) == 14
    assert not any(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(dict(trainer.model.named_parameters())[name], value) for name, value in floats.items())
    model = trainer.model.eval()
    expected = logits(model, IDS)
    if not options.get("bf16"):  # accelerate leaves autocast in the adapted model's forward, not in the merged one's
        assert torch.equal(logits(model.merge_and_unload(), IDS), expected)


def test_a_learning_rate_of_zero_changes_nothing_under_the_trainer(tmp_path: Path):
    model = low_bit(tiny(), **CONFIG)
    before = codes(model)
    Trainer(model, arguments(tmp_path, learning_rate=0.0, max_steps=3), train_dataset=ids_dataset()).train()
    assert all(torch.equal(value, before[name]) for name, value in codes(model).items())


OURS = (LowBitAdamW, {"lr": 1e-2, "error_feedback": True})
FUSED = (LowBitAdamW, {"lr": 1e-2, "fused_backward": True})  # which hears of accumulation by itself


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (None, {}),
        (None, {"gradient_accumulation_steps": 2, "optim": "adafactor"}),
        (OURS, {}),
        (FUSED, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}),
    ],
    ids=["fused-adamw", "adafactor-accumulated", "LowBitAdamW", "LowBitAdamW-fused-backward"],
)
def test_a_checkpoint_resumes_bit_for_bit(tmp_path: Path, optimizer, options: dict):
    def trainer(folder: Path, **more) -> Trainer:
        model = low_bit(tiny(), **CONFIG | {"bits": 4, "learn_scales": True})
        args = arguments(folder, **{"weight_decay": 0.1, **options, **more})
        return Trainer(model, args, train_dataset=ids_dataset(), optimizer_cls_and_kwargs=optimizer)

    torch.manual_seed(0)
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=3)
    start = codes(whole.model)
    whole.train()
    torch.manual_seed(1)  # the random numbers that round are not torch's
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))

    expected, found = codes(whole.model), codes(resumed.model)
    assert not any(torch.equal(expected[name], start[name]) for name in start)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    shifts = [(p, q) for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True)]
    assert all(torch.equal(p, q) for p, q in shifts)


def test_updates_in_backward_hear_of_accumulation(tmp_path: Path):
    def trained(fused: bool) -> dict[str, torch.Tensor]:
        options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "max_steps": 3}
        torch.manual_seed(0)
        trainer = Trainer(
            low_bit(tiny(num_hidden_layers=1), **CONFIG),
            arguments(tmp_path, **options),
            train_dataset=ids_dataset(),
            optimizer_cls_and_kwargs=(LowBitAdamW, {"lr": 1e-2, "fused_backward": fused}),
        )
        trainer.train()
        assert all(int(p.stream[1]) == 3 for p in trainer.model.parameters() if isinstance(p, LowBitTensor))
        return codes(trainer.model)

    fused, ordinary = trained(True), trained(False)
    assert all(torch.equal(fused[name], ordinary[name]) for name in ordinary)


def test_clipping_of_released_gradients_is_refused_by_name(tmp_path: Path):
    model = low_bit(tiny(), **CONFIG)
    trainer = Trainer(
        model,
        arguments(tmp_path),  # whose max_grad_norm is 1.0
        train_dataset=ids_dataset(),
        optimizer_cls_and_kwargs=(LowBitAdamW, {"lr": 1e-2, "fused_backward": True}),
    )
    with pytest.raises(RuntimeError, match="max_grad_norm=0"):
        trainer.train()


def test_transformers_arguments_are_the_usual_ones():
    assert TrainingArguments("x").optim == "adamw_torch_fused"  # what this file's first test is about
