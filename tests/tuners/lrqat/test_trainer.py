"""Unmodified Trainer and SFTTrainer: training, the default optimizer, weight decay, and resuming bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from peft_lrqat import LRQATConfig, create_lrqat_optimizer, load_quantized
from peft_lrqat.tuners.lrqat import LRQATLinear
from tests.models import adapted, logits, tiny, tokens
from tests.quantized_files import Spec, write
from tests.trainer import arguments, ids_dataset, losses

IDS = tokens()
CONFIG = {
    "bits": 4,
    "group_size": 8,
    "r": 4,
    "lora_alpha": 32,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}


def layers(model: torch.nn.Module) -> list[LRQATLinear]:
    return [module for module in model.modules() if isinstance(module, LRQATLinear)]


def test_sft_trainer_starts_from_a_quantized_checkpoint(tmp_path: Path, tokenizer, text: Dataset):
    write(tmp_path / "base", Spec("gptq", 4, 32, dtype=torch.float32, scale_dtype=torch.float16))
    trainer = SFTTrainer(
        model=load_quantized(tmp_path / "base"),
        args=arguments(
            tmp_path / "adapter", SFTConfig, max_steps=6, learning_rate=0.1, save_strategy="steps", save_steps=6
        ),
        train_dataset=text,
        processing_class=tokenizer,
        peft_config=LRQATConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    model = trainer.model.eval()
    trained = logits(model, IDS)
    saved = PeftModel.from_pretrained(load_quantized(tmp_path / "base"), tmp_path / "adapter" / "checkpoint-6")
    assert torch.equal(logits(saved, IDS), trained)
    assert torch.equal(logits(model.merge_and_unload(), IDS), trained)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": False}])
def test_sft_trainer_takes_the_config_as_it_takes_loras(tmp_path: Path, tokenizer, text: Dataset, options: dict):
    trainer = SFTTrainer(
        model=tiny(),
        args=arguments(tmp_path, SFTConfig, max_steps=12, learning_rate=0.1, **options),
        train_dataset=text,
        processing_class=tokenizer,
        peft_config=LRQATConfig(**CONFIG),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0], losses(trainer)
    for name, p in trainer.model.named_parameters():
        # the default optimizer trains lora_A, lora_B and scales, and nothing else
        assert torch.equal(p, before[name]) != ("lora_" in name), name
        assert p.requires_grad == ("lora_" in name)


def test_what_sft_trains_is_what_is_merged_and_saved(tmp_path: Path, tokenizer, text: Dataset):
    trainer = SFTTrainer(
        model=tiny(), args=arguments(tmp_path, SFTConfig), train_dataset=text, processing_class=tokenizer,
        peft_config=LRQATConfig(**CONFIG),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    model = trainer.model.eval()
    expected = logits(model, IDS)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, IDS), expected)
    assert torch.equal(logits(model.merge_and_unload(), IDS), expected)


def test_weight_decay_leaves_the_scales_near_where_they_started(tmp_path: Path):
    # decayed as ordinary parameters, scales would lose (1 - lr * decay)^steps = 99 % of their size here
    model = adapted(tiny(), **CONFIG)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=10, weight_decay=3.6, learning_rate=1e-1, lr_scheduler_type="constant"),
        train_dataset=ids_dataset(),
    )
    trainer.train()
    decayed = {id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    for layer in layers(model):
        shift = layer.lora_scale_shift["default"].weight
        assert id(shift) in decayed  # so this test is about decay
        assert shift.abs().max() < 0.6
        assert shift.isfinite().all()


def test_scales_train_in_a_bf16_model(tmp_path: Path):
    model = adapted(tiny(dtype=torch.bfloat16), **CONFIG)
    Trainer(model=model, args=arguments(tmp_path, max_steps=2, learning_rate=1e-5), train_dataset=ids_dataset()).train()
    for layer in layers(model):
        shift = layer.lora_scale_shift["default"].weight
        assert shift.dtype == torch.float32
        assert shift.abs().max() > 0


@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2])
def test_a_checkpoint_resumes_bit_for_bit(tmp_path: Path, gradient_accumulation_steps: int):
    def trainer(folder: Path, **options) -> Trainer:
        model = adapted(tiny(), **CONFIG, modules_to_save=["lm_head"])
        settings = {"gradient_accumulation_steps": gradient_accumulation_steps, "weight_decay": 0.1, **options}
        return Trainer(model=model, args=arguments(folder, **settings), train_dataset=ids_dataset())

    torch.manual_seed(0)
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"

    torch.manual_seed(1)  # other values in the adapter that the checkpoint is loaded into
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))

    expected = dict(whole.model.named_parameters())
    found = dict(resumed.model.named_parameters())
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    shifts = [layer.lora_scale_shift["default"].weight for layer in layers(resumed.model)]
    assert all(shift.abs().max() > 0 for shift in shifts)


def test_resuming_on_another_base_is_refused(tmp_path: Path):
    def trainer(seed: int) -> Trainer:
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        return Trainer(adapted(tiny(seed=seed), **CONFIG), arguments(tmp_path, **options), train_dataset=ids_dataset())

    trainer(0).train()
    with pytest.raises(ValueError, match="trained on another base"):
        trainer(1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# -- create_lrqat_optimizer


def test_the_optimizer_puts_scales_in_a_group_of_their_own(tmp_path: Path):
    model = adapted(tiny("qwen2"), **CONFIG, bias="all", modules_to_save=["lm_head"])
    optimizer = create_lrqat_optimizer(model, lr=1e-2, scale_lr=1e-3, weight_decay=0.1)
    assert isinstance(optimizer, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain, scales = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(1e-2, 0.1), (1e-2, 0.0), (1e-3, 0.0)]
    assert scales == {name for name in names.values() if "lora_scale_shift" in name}
    assert plain == {name for name in names.values() if name.endswith("bias")}
    assert decayed | plain | scales == {name for name, p in model.named_parameters() if p.requires_grad}

    trainer = Trainer(model, arguments(tmp_path), train_dataset=ids_dataset(), optimizers=(optimizer, None))
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert any(state["exp_avg"].abs().max() > 0 for state in optimizer.state.values())


def test_the_optimizer_takes_any_class_and_one_learning_rate():
    model = adapted(tiny(), **CONFIG)
    optimizer = create_lrqat_optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    assert [(g["lr"], g["weight_decay"], g["momentum"]) for g in optimizer.param_groups] == [(0.1, 0.0, 0.9)] * 2


def test_the_optimizer_refuses_a_model_with_nothing_to_train():
    model = tiny()
    with pytest.raises(ValueError, match="no trainable LR-QAT adapter"):
        create_lrqat_optimizer(model, lr=1e-3)
    frozen = adapted(model, **CONFIG).requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        create_lrqat_optimizer(frozen, lr=1e-3)


@pytest.mark.parametrize("option", ["lr", "scale_lr", "weight_decay"])
@pytest.mark.parametrize("value", ["1e-3", -1])
def test_the_optimizer_refuses_rates_that_are_none(option: str, value: object):
    with pytest.raises(ValueError, match=f"`{option}` is {value!r}; it must be a number of 0 or more"):
        create_lrqat_optimizer(adapted(tiny(), **CONFIG), **{"lr": 1e-3, option: value})
    with pytest.raises(ValueError, match="`optimizer_cls` is 'adamw'; it must be a class"):
        create_lrqat_optimizer(adapted(tiny(), **CONFIG), "adamw", lr=1e-3)
