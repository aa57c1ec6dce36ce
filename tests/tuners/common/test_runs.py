"""What Trainers know reaches the cards of adapters and of merged models, and nothing that they do not know."""

import copy
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_lrqat import LRQATConfig, QuantizationCallback, export
from peft_lrqat.checkpoint.merge import merge
from tests.models import adapted, tiny, tokens, train
from tests.trainer import arguments, counting_text, ids_dataset, word_tokenizer

CONFIG = {"r": 4, "group_size": -1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def run(model, folder, steps=2, kind=Trainer, **options):
    args = arguments(folder, max_steps=steps, **options)
    return kind(model, args, None, ids_dataset(), ids_dataset().select(range(8)))


def row(folder: Path, name: str) -> str:
    """What a saved card's table says of `name`, "" if nothing."""
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    return next((line.split(" | ")[1].removesuffix(" |") for line in lines if line.startswith(f"| {name} |")), "")


@pytest.fixture
def pushed(monkeypatch):
    """README.md of each upload of a Trainer."""
    sent: list[str] = []

    def upload_folder(folder_path, **kwargs):
        sent.append((Path(folder_path) / "README.md").read_text(encoding="utf-8"))
        return SimpleNamespace(done=lambda: True)

    create = lambda name, **kwargs: SimpleNamespace(repo_id=f"me/{name}")  # noqa: E731
    monkeypatch.setattr(
        transformers.trainer, "hf_api", lambda: SimpleNamespace(create_repo=create, upload_folder=upload_folder)
    )
    return sent


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_a_pushed_adapter_says_how_to_load_it_and_what_the_trainer_logged(kind, pushed, tmp_path):
    folder = tmp_path / "poems"
    if kind == "trainer":
        trainer = run(adapted(tiny()), folder)
    else:
        args = arguments(folder, SFTConfig, max_steps=2, max_length=16)
        trainer = SFTTrainer(
            tiny(), args, train_dataset=counting_text(), processing_class=word_tokenizer(),
            peft_config=LRQATConfig(**CONFIG), eval_dataset=counting_text().select(range(8)),
        )  # fmt: skip
    trainer.evaluate()
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.push_to_hub()
    (text,) = pushed
    card = ModelCard(text)
    assert 'from_pretrained("me/poems", dtype="float32")' in text
    assert text.index("import peft_lrqat") < text.index("## ")
    assert not any(
        empty in text for empty in ("More information needed", "Quick start", "None](", "](https://huggingface.co/)")
    )
    assert card.data.library_name == "peft"
    assert {"lr-qat", "4-bit"} <= set(card.data.tags)
    assert row(folder, "training").startswith(f"{type(trainer).__name__}, 2 steps")
    assert f"{loss:.4g} (perplexity {torch.tensor(loss).exp():.4g}) after step 2" in row(folder, "evaluation")
    assert "before training, " in row(folder, "evaluation")


def test_every_checkpoint_that_is_pushed_is_complete(pushed, tmp_path):
    args = arguments(
        tmp_path, SFTConfig, max_steps=2, max_length=16, save_strategy="steps", save_steps=1, push_to_hub=True,
        hub_strategy="checkpoint",
    )  # fmt: skip
    SFTTrainer(
        tiny(), args, train_dataset=counting_text(), processing_class=word_tokenizer(),
        peft_config=LRQATConfig(**CONFIG),
    ).train()  # fmt: skip
    assert len(pushed) >= 2
    assert all("import peft_lrqat" in text for text in pushed)


def test_the_card_of_a_merged_model_has_the_losses_before_and_after(tmp_path):
    model = adapted(tiny())
    trainer = run(model, tmp_path, eval_on_start=True, eval_strategy="steps", eval_steps=2)
    trainer.train()
    before, after = (entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    del trainer
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    said = row(tmp_path / "merged", "evaluation")
    assert said.startswith(f"loss {before:.4g} (perplexity")
    assert f"before training, loss {after:.4g}" in said
    assert ModelCard((tmp_path / "merged" / "README.md").read_text()).data.pipeline_tag == "text-generation"


def test_without_a_trainer_nothing_is_said(tmp_path):
    model = adapted(tiny())
    train(model, tokens())
    model.save_pretrained(tmp_path)
    assert not row(tmp_path, "training")
    assert not row(tmp_path, "evaluation")


def test_an_evaluation_alone_is_no_training(tmp_path):
    model = adapted(tiny())
    run(model, tmp_path).evaluate()
    model.save_pretrained(tmp_path)
    assert not row(tmp_path, "training")
    assert not row(tmp_path, "evaluation")


def test_the_best_checkpoint_is_the_one_that_is_described(tmp_path):
    class Worse(Trainer):
        """Evaluates to 1, 2, 3: the first is the best."""

        def evaluate(self, *args, **kwargs):
            self.model.eval()
            metrics = {"eval_loss": float(self.state.global_step)}
            self.log(metrics)
            return metrics

    model = adapted(tiny())
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run(model, tmp_path, 3, Worse, load_best_model_at_end=True, **options).train()
    model.save_pretrained(tmp_path / "out")
    assert row(tmp_path / "out", "evaluation").startswith("loss 1 (perplexity 2.718) of the best checkpoint, step 1")


def test_each_training_is_a_row_of_the_adapter_that_it_trained(tmp_path):
    model = adapted(tiny())
    run(model, tmp_path, 1).train()
    run(model, tmp_path, 2).train()
    model.add_adapter("other", LRQATConfig(**CONFIG))
    model.set_adapter("other")
    run(model, tmp_path, 3).train()
    model.save_pretrained(tmp_path / "both", selected_adapters=["default"])
    assert row(tmp_path / "both", "training 1").startswith("Trainer, 1 steps")
    assert row(tmp_path / "both", "training 2").startswith("Trainer, 2 steps")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert row(tmp_path / "merged", "training").startswith("Trainer, 3 steps")


def test_the_loss_of_dpo_is_no_cross_entropy(tmp_path):
    pairs = [{"prompt": "w3 w4", "chosen": "w5 w6", "rejected": "w7 w8"}] * 4
    data = Dataset.from_list(pairs)
    args = arguments(tmp_path, DPOConfig, max_steps=1, max_length=16)
    trainer = DPOTrainer(
        tiny(), args=args, train_dataset=data, eval_dataset=data, processing_class=word_tokenizer(),
        peft_config=LRQATConfig(**CONFIG), callbacks=[QuantizationCallback(plot=False)],
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    assert row(tmp_path, "training").startswith("DPOTrainer, 1 steps")
    assert row(tmp_path, "evaluation").startswith("loss")
    assert "perplexity" not in row(tmp_path, "evaluation")
    assert row(tmp_path, "integers").endswith("% changed after step 1")


def test_a_trainer_that_is_let_go_of_is_freed_and_models_can_be_copied(tmp_path):
    model = adapted(tiny())
    trainer = run(model, tmp_path, 1)
    trainer.train()
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    assert row(tmp_path / "copy", "training").startswith("Trainer, 1 steps")


def test_a_model_around_the_adapters_is_trained(tmp_path):
    class Around(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.pretrained_model, self.config = model, model.config

        def forward(self, input_ids, labels=None):
            return self.pretrained_model(input_ids=input_ids, labels=labels)

    model = adapted(tiny())
    trainer = run(Around(model), tmp_path, 1)
    trainer.train()
    trainer.create_model_card(model_name="around")
    assert row(tmp_path, "training").startswith("Trainer, 1 steps")
    model.save_pretrained(tmp_path / "adapter")
    assert row(tmp_path / "adapter", "training").startswith("Trainer, 1 steps")


def test_what_was_trained_is_said_of_all_that_is_made_of_it_later(tmp_path):
    """Nothing but the adapter's file, and then the merged model's, knows of the training."""
    tiny(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    model = tiny(num_hidden_layers=1)
    model.name_or_path = str(tmp_path / "base")
    model = adapted(model)
    run(model, tmp_path / "run", eval_on_start=True, eval_strategy="steps", eval_steps=2).train()
    model.save_pretrained(tmp_path / "adapter")
    said = {name: row(tmp_path / "adapter", name) for name in ("training", "evaluation")}
    assert all(said.values())
    merge(tmp_path / "adapter", tmp_path / "merged")
    export(tmp_path / "adapter", tmp_path / "exported")
    export(tmp_path / "merged", tmp_path / "again")
    for made in ("merged", "exported", "again"):
        text = (tmp_path / made / "README.md").read_text()
        assert text.index("| training |") < text.index("| evaluation |")
        assert {name: row(tmp_path / made, name) for name in said} == said
        assert row(tmp_path / made, "base model") == "base"

    loaded = PeftModel.from_pretrained(tiny(num_hidden_layers=1), tmp_path / "adapter", is_trainable=True)
    run(loaded, tmp_path / "run", 3).train()
    loaded.save_pretrained(tmp_path / "further")
    assert row(tmp_path / "further", "training 1") == said["training"]
    assert row(tmp_path / "further", "training 2").startswith("Trainer, 3 steps")
    # an adapter that has the other's configuration, and not its values
    fresh = get_peft_model(tiny(num_hidden_layers=1), PeftConfig.from_pretrained(tmp_path / "adapter"))
    fresh.save_pretrained(tmp_path / "fresh")
    assert not row(tmp_path / "fresh", "training")
