"""`LowBitAdamW.for_trainer`: one argument of a Trainer, and its own arguments count."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_lrqat import LowBitAdamW, LowBitSRConfig
from peft_lrqat.tuners.lowbit_sr import LowBitTensor
from tests.lowbit_sr import codes
from tests.models import low_bit, tiny
from tests.trainer import arguments, ids_dataset, losses


def trained(args: TrainingArguments, optimizer: Any) -> Trainer:
    model = low_bit(tiny(num_hidden_layers=1), bits=8, group_size=-1, target_modules="all-linear", learn_scales=True)
    trainer = Trainer(model, args, train_dataset=ids_dataset(), optimizer_cls_and_kwargs=optimizer)
    trainer.train()
    return trainer


def test_the_trainers_rate_and_decay_train_without_a_gradient_that_waits(tmp_path: Path):
    args = arguments(tmp_path, learning_rate=3e-3, weight_decay=0.1, adam_beta2=0.95, max_steps=3)
    ours = trained(args, LowBitAdamW.for_trainer(args))
    options = {"lr": 3e-3, "betas": (0.9, 0.95), "fused_backward": False}
    unclipped = arguments(tmp_path, learning_rate=3e-3, weight_decay=0.1, max_grad_norm=0.0, max_steps=3)
    by_hand = trained(unclipped, (LowBitAdamW, options))
    inner = ours.optimizer.optimizer
    assert inner.fused_backward
    assert {group["weight_decay"] for group in inner.param_groups} == {0.1, 0.0}
    assert all(group["initial_lr"] == 3e-3 for group in inner.param_groups)
    pairs = list(zip(ours.model.parameters(), by_hand.model.parameters(), strict=True))
    assert sum(isinstance(p, LowBitTensor) for p, _ in pairs) == 7
    assert all(
        torch.equal(p.codes(), q.codes()) if isinstance(p, LowBitTensor) else torch.equal(p, q) for p, q in pairs
    )


def test_what_nobody_has_chosen_is_the_optimizers_own(tmp_path: Path):
    args = arguments(tmp_path)
    kind, options = LowBitAdamW.for_trainer(args, state="factored", lr=1e-3)
    assert kind is LowBitAdamW
    assert options == {"lr": 1e-3, "eps": 1e-8, "fused_backward": True, "state": "factored"}
    args = arguments(tmp_path)
    with pytest.raises(TypeError, match=r"`stat`\. Did you mean `state`"):
        LowBitAdamW.for_trainer(args, stat="factored")
    with pytest.raises(ValueError, match="`state` is '4bit'"):
        LowBitAdamW.for_trainer(args, state="4bit")
    assert args.max_grad_norm == 1.0  # an error changes nothing


def test_clipping_ends_where_it_is_the_default_and_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    args = arguments(tmp_path)
    LowBitAdamW.for_trainer(args, fused_backward=False)
    assert args.max_grad_norm == 1.0
    LowBitAdamW.for_trainer(args)
    assert args.max_grad_norm == 0.0
    assert caplog.text.count("`max_grad_norm`") == 1


def test_steps_of_an_accumulation_may_be_told(tmp_path: Path):
    """`fused_backward`, with which alone they matter, is on by itself."""
    args = arguments(tmp_path)
    assert LowBitAdamW.for_trainer(args, gradient_accumulation_steps=2)[1]["gradient_accumulation_steps"] == 2
    with pytest.raises(ValueError, match="matters with `fused_backward=True` only"):
        LowBitAdamW.for_trainer(args, gradient_accumulation_steps=2, fused_backward=False)


def test_clipping_that_was_asked_for_is_not_dropped(tmp_path: Path):
    args = arguments(tmp_path, max_grad_norm=0.5)
    with pytest.raises(ValueError, match=r"0\.5.*`max_grad_norm=0`.*`fused_backward=False`"):
        LowBitAdamW.for_trainer(args)
    assert not LowBitAdamW.for_trainer(args, fused_backward=False)[1]["fused_backward"]
    assert args.max_grad_norm == 0.5


def test_several_processes_average_gradients_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    args = arguments(tmp_path)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *group: 2)
    assert not LowBitAdamW.for_trainer(args)[1]["fused_backward"]
    assert args.max_grad_norm == 1.0


def test_one_process_of_torchrun_is_wrapped_as_several_are(tmp_path: Path):
    args = arguments(tmp_path)
    args.distributed_state = SimpleNamespace(num_processes=1, distributed_type=DistributedType.MULTI_GPU)
    assert not LowBitAdamW.for_trainer(args)[1]["fused_backward"]
    assert LowBitAdamW.for_trainer(args, fused_backward=True)[1]["fused_backward"]


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match=r"`args` is dict.*SFTConfig"):
        LowBitAdamW.for_trainer({"learning_rate": 3e-5})


@pytest.mark.parametrize("ours", [True, False], ids=["LowBitAdamW", "Trainer's AdamW"])
def test_dpo_goes_on_with_what_sft_trained(ours: bool, tmp_path: Path, tokenizer, text: Dataset):
    config = LowBitSRConfig(bits=8, group_size=-1, task_type="CAUSAL_LM")
    args = arguments(tmp_path, SFTConfig, max_steps=2)
    common = {"processing_class": tokenizer}
    sft = SFTTrainer(
        tiny(), args, None, text, **common, peft_config=config, optimizer_cls_and_kwargs=LowBitAdamW.for_trainer(args)
    )
    sft.train()  # its optimizer lives as long as this trainer, and its learning rate is 0 now
    before = codes(sft.model)
    args = arguments(tmp_path, DPOConfig, max_steps=2, learning_rate=1e-3)
    pair = {"prompt": "w3 w4", "chosen": "w5 w6", "rejected": "w9 w4"}
    dpo = DPOTrainer(sft.model, args=args, train_dataset=Dataset.from_list([pair] * 8), **common)
    if ours:
        dpo.optimizer_cls_and_kwargs = LowBitAdamW.for_trainer(args)
    dpo.train()
    assert isinstance(dpo.optimizer.optimizer, LowBitAdamW) == ours
    assert losses(dpo)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(dpo)[1] < 0.69
    trained = [p for n, p in dpo.model.named_parameters() if isinstance(p, LowBitTensor) and ".ref." not in n]
    assert not any(torch.equal(p.codes(), q) for p, q in zip(trained, before, strict=True))
