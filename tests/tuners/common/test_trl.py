"""TRL's trainers, unmodified: two steps with both methods, then merged, saved, and reloaded by plain transformers.

Names of trainers are strings, because most of TRL's modules take long to import and few tests need them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
)

from tests import lowbit_sr, lrqat, tokenizers
from tests.models import logits, tiny, tokens, train
from tests.trainer import arguments, counting_text, losses, word_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning"
)  # TRL's trainers move between `trl` and `trl.experimental`
IDS = tokens()


def words(start: int, count: int = 5) -> str:
    return " ".join(f"w{3 + (start + i) % 40}" for i in range(count))


def chat(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": words(i)}, {"role": "assistant", "content": words(i + 5)}]


def length_reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(completion) % 7) for completion in completions]


def paired(**columns: int) -> Dataset:
    """Column -> how far its words are from the prompt's."""
    return Dataset.from_list([{name: words(i + ahead) for name, ahead in columns.items()} for i in range(8)])


PREFERENCES = paired(prompt=0, chosen=5, rejected=9)
PROMPTS = paired(prompt=0)
CHATS = Dataset.from_list([{"messages": chat(i)} for i in range(8)])
LABELLED = Dataset.from_list([{"prompt": words(i), "completion": words(i + 5), "label": i % 2 == 0} for i in range(8)])
TEACHER = {"teacher_model": 3}
SHORT = {"max_completion_length": 4}
SAMPLED = {**SHORT, "use_vllm": False}
GROUPS = {**SAMPLED, "num_generations": 2}
NEW = {"max_new_tokens": 4}
REWARD = {"reward_funcs": length_reward}


def chatting() -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tokenizer


def bytewise() -> PreTrainedTokenizerFast:
    tokenizer = tokenizers.bytewise("llama-bpe")
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


@dataclass(frozen=True)
class Road:
    """A trainer, and what it wants beside the model."""

    trainer: str  # "trl.SFT": trl.SFTTrainer and trl.SFTConfig
    data: Dataset
    options: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)  # the trainer's own arguments; a teacher is given by its seed
    tokenizer: Callable[[], PreTrainedTokenizerFast] = chatting


ROADS = {
    "sft": Road("trl.SFT", counting_text()),
    "dpo": Road("trl.DPO", PREFERENCES),
    "kto": Road("trl.KTO", LABELLED, {"per_device_train_batch_size": 4}),
    "grpo": Road("trl.GRPO", PROMPTS, {**GROUPS, "beta": 0.1}, REWARD),
    "rloo": Road("trl.RLOO", PROMPTS, {**GROUPS, "beta": 0.1}, REWARD),
    "reward": Road("trl.Reward", PREFERENCES),
    "distillation": Road("trl.Distillation", PROMPTS, SAMPLED, TEACHER),
    "orpo": Road("trl.experimental.orpo.ORPO", PREFERENCES),
    "cpo": Road("trl.experimental.cpo.CPO", PREFERENCES),
    "gkd": Road("trl.experimental.gkd.GKD", CHATS, NEW, TEACHER),
    "online_dpo": Road("trl.experimental.online_dpo.OnlineDPO", PROMPTS, NEW, REWARD),
    "tpo": Road("trl.experimental.tpo.TPO", paired(prompt=0, chosen=5, rejected=9, reference=6)),
    "gold": Road("trl.experimental.gold.GOLD", CHATS, {**SHORT, "use_uld_loss": False}, TEACHER, bytewise),
    "gmpo": Road("trl.experimental.gmpo.GMPO", PROMPTS, GROUPS, REWARD),
    "a2po": Road("trl.experimental.a2po.A2PO", PROMPTS, SHORT, REWARD),
    "sdpo": Road("trl.experimental.sdpo.SDPO", PROMPTS, {**GROUPS, "teacher_model_kind": "base"}, REWARD),
}  # fmt: skip
BY_DEFAULT = [("sft", "config"), ("dpo", "config"), ("dpo", "model"), ("grpo", "model"), ("reward", "config")]
ALL = [(name, given) for name in ROADS for given in ("config", "model")]
ALL.remove(("a2po", "config"))  # the trainer takes none


@pytest.fixture
def start(method: ModuleType, tmp_path: Path):
    """A trainer of one of `ROADS`, given a configuration, or a PeftModel that was trained before."""

    def make(name: str, given: str, config: dict[str, Any] | None = None, **options: Any) -> Trainer:
        road = ROADS[name]
        trainer, arguments_of = _from_trl(road)
        tokenizer = road.tokenizer()
        scores = name == "reward"
        base: Any = tiny(vocab_size=len(tokenizer))
        if scores:
            base.config.num_labels = 1
            base = AutoModelForSequenceClassification.from_config(base.config)
        peft = method.config(task_type="SEQ_CLS" if scores else "CAUSAL_LM", **(config or {}))
        more = {
            key: tiny(seed=value, vocab_size=len(tokenizer)) if key == "teacher_model" else value
            for key, value in road.more.items()
        }
        if given == "config":
            model, more["peft_config"] = base, peft
        else:
            model = get_peft_model(base, peft)
            if not scores:
                train(model, IDS, lr=1e-2)
        settings = {"max_steps": 2, "per_device_train_batch_size": 2, **road.options, **options}
        return trainer(
            model=model,
            args=arguments(tmp_path, arguments_of, **settings),
            train_dataset=road.data,
            processing_class=tokenizer,
            **more,
        )

    return make


def _from_trl(road: Road) -> tuple[Any, Any]:
    """A trainer's class and that of its arguments; skips the test where this version of TRL has none such."""
    module, _, stem = road.trainer.rpartition(".")
    library = pytest.importorskip(module)
    trainer, arguments_of = (getattr(library, stem + end, None) for end in ("Trainer", "Config"))
    if trainer is None or arguments_of is None or not road.options.keys() <= arguments_of.__dataclass_fields__.keys():
        pytest.skip(f"this version of TRL has no {road.trainer}Trainer, or an earlier one")
    return trainer, arguments_of


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "given"),
    [pytest.param(*road, marks=[] if road in BY_DEFAULT else [pytest.mark.slow]) for road in ALL],
)
def test_what_a_trainer_trains_is_what_is_served(start, method: ModuleType, tmp_path: Path, name: str, given: str):
    trainer = start(name, given)
    before = trained_parameters(trainer.model)
    trainer.train()
    model = trainer.model.eval()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    after = trained_parameters(model)
    assert after.keys() == before.keys()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert any("proj" in key for key in moved)
    if name == "reward":
        assert any("score" in key for key in moved)
    expected = logits(model, IDS)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, IDS), expected)
    merged.save_pretrained(tmp_path / "merged")
    loader = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    assert torch.equal(logits(loader.from_pretrained(tmp_path / "merged").eval(), IDS), expected)


# -- a trained adapter as its own reference


def trl_copies(model: PeftModel) -> None:
    """What TRL does to make a reference of a trained adapter (DPO, KTO, GRPO, RLOO)."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


def test_a_copy_by_names_is_the_adapter_whole(method: ModuleType):
    options = {**method.GRID, "learn_scales": True, "modules_to_save": ["lm_head"]}
    model = method.adapt(tiny(), **options)
    train(model, IDS, lr=1e-2)
    expected = logits(model, IDS)
    trl_copies(model)
    assert all(".default." in name for name in trained_parameters(model))
    model.set_adapter("ref")
    assert torch.equal(logits(model.eval(), IDS), expected)
    for layer in method.layers(model).values():  # numbers, not memory, are what the two share
        assert {p.data_ptr() for p in parts(layer, "ref")}.isdisjoint(p.data_ptr() for p in parts(layer, "default"))


def parts(layer: torch.nn.Module, adapter: str) -> list[torch.Tensor]:
    found = [p for name, p in layer.named_parameters() if f".{adapter}." in name]
    return [getattr(p, "packed", p) for p in found]


@pytest.mark.parametrize(
    ("name", "figure", "value"),
    [
        ("dpo", "loss", math.log(2)),
        pytest.param("kto", "loss", 0.5, marks=pytest.mark.slow),
        pytest.param("grpo", "kl", 0.0, marks=pytest.mark.slow),
        pytest.param("rloo", "kl", 0.0, marks=pytest.mark.slow),
    ],
)
def test_the_reference_stays_what_the_model_was(start, method: ModuleType, name: str, figure: str, value: float):
    trainer = start(name, "model", {"learn_scales": True})
    model = trainer.model.eval()
    policy = logits(model, IDS)
    ref = {key: p.detach().clone() for key, p in model.named_parameters() if ".ref." in key}
    if not ref:
        pytest.skip("this version of TRL's trainer compares with the base")
    trainer.train()
    assert trainer.state.log_history[0][figure] == pytest.approx(value, abs=1e-7)
    assert not torch.equal(logits(model.eval(), IDS), policy)
    assert all(torch.equal(p, ref[key]) for key, p in model.named_parameters() if key in ref)
    names = {id(p): key for key, p in model.named_parameters()}
    assert not any(".ref." in names[id(p)] for p in trainer.optimizer.state)
    assert not any(".ref." in names[id(p)] for g in trainer.optimizer.param_groups for p in g["params"])
    model.set_adapter("ref")
    assert torch.equal(logits(model, IDS), policy)


def test_without_a_trained_adapter_the_reference_is_the_rounded_base(start, method: ModuleType):
    trainer = start("dpo", "config")
    base = logits(trainer.model.eval(), IDS)  # no step was made yet
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-7)
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model.eval(), IDS), base)
    rounded = method.adapt(tiny(), **method.GRID).unload()
    assert torch.equal(logits(rounded.eval(), IDS), base)


def test_a_loaded_adapter_has_its_reference(method: ModuleType, base_folder: Path, saved: Path):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), saved, is_trainable=True)
    expected = logits(model.eval(), IDS)
    trl_copies(model)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".ref." in name)
    model.set_adapter("ref")
    assert torch.equal(logits(model.eval(), IDS), expected)


def test_the_reference_of_an_adapter_that_loftq_started():
    model = lrqat.adapt(tiny(), **lrqat.GRID, init_lora_weights="loftq", downcast="int")
    train(model, IDS, lr=1e-2)
    expected = logits(model, IDS)
    trl_copies(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model.eval(), IDS), expected)


def test_a_reference_that_would_be_another_model_is_refused(method: ModuleType):
    model = method.adapt(tiny(), **method.GRID, trainable_token_indices=[5, 6])
    with pytest.raises(ValueError, match=r"'ref'.*leaves out.*`trainable_token_indices`.*ref_model"):
        trl_copies(model)
    assert list(model.peft_config) == ["default"]
    model.add_adapter("other", model.peft_config["default"])  # a fresh adapter, whatever made it


def test_a_dropped_base_has_no_room_for_a_reference():
    model = lowbit_sr.adapt(tiny(), **lowbit_sr.GRID, keep_base=False)
    with pytest.raises(ValueError, match=r"`keep_base=False` dropped.*'ref' would start.*TRL's reference"):
        trl_copies(model)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="of several adapters, Trainer put all back but 'default' before transformers 5.23",
)
def test_training_with_a_reference_resumes_bit_for_bit(start, tmp_path: Path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = start("dpo", "model", **options)
    whole.train()
    resumed = start("dpo", "model", **options)
    with torch.no_grad():
        for name, parameter in resumed.model.named_parameters():
            if ".default." in name or ".ref." in name:  # what the checkpoint must put back
                parameter.copy_(torch.zeros(parameter.shape))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in resumed.model.named_parameters())
    assert losses(resumed)[-1] == losses(whole)[-1]
