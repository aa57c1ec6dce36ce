"""A float model, quantized on calibration text, as the base of LR-QAT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_lrqat import LRQATConfig, load_quantized, preprocess_gptq
from peft_lrqat.modules.packed import QuantizedLinear
from tests.mixtures import mixture
from tests.models import adapted, logits, tiny, tokens, train

IDS = tokens()
TEXT = [tokens(4, 32, seed=seed) for seed in range(2, 8)]


def config(**options) -> LRQATConfig:
    settings = {"r": 4, "lora_alpha": 32, "group_size": -1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LRQATConfig(**{**settings, **options})


@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 2, "group_size": 16, "symmetric": False}], ids=str)
def test_start_train_save_and_reload(options: dict, tmp_path: Path):
    model = tiny(dtype=torch.bfloat16)
    wanted = config(**options)
    preprocess_gptq(model, wanted, TEXT, progressbar=False)
    start = logits(model, IDS)
    model.save_pretrained(tmp_path / "base")
    for load in (load_quantized, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(load(tmp_path / "base"), IDS), start)

    peft_model = get_peft_model(model, wanted)
    assert torch.equal(logits(peft_model, IDS), start)
    train(peft_model, IDS)
    trained = logits(peft_model, IDS)
    peft_model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_quantized(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again, IDS), trained)
    peft_model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), IDS), trained)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "opt"])
def test_outputs_are_nearer_to_the_float_model(family: str):
    text = torch.cat(TEXT)
    expected = logits(tiny(family), text)
    model = tiny(family)
    preprocess_gptq(model, config(bits=3), TEXT, progressbar=False)
    assert all(isinstance(m, QuantizedLinear) for n, m in model.named_modules() if n.endswith("q_proj"))
    nearest = adapted(tiny(family), bits=3)
    error, of_nearest = ((logits(m, text) - expected).pow(2).mean() for m in (model, nearest))
    assert error < 0.95 * of_nearest


def test_hooks_stay_on_the_layers():
    model, seen = tiny(num_hidden_layers=1), []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, args, y: seen.append(type(module)))
    preprocess_gptq(model, config(), TEXT[:1], progressbar=False)
    seen.clear()
    logits(model, IDS)
    assert seen == [QuantizedLinear]


def test_forms_of_calibration_text_and_padding():
    words = torch.cat(TEXT)[:4]
    padded = {
        "input_ids": torch.nn.functional.pad(words, (0, 3), value=5),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(words), (0, 3)),
    }

    found = []
    for calibration, tool in (
        ([words], None),
        (words, None),
        (list(words), None),
        ({"input_ids": words}, None),
        ([{"input_ids": words}], None),
        ([padded], None),
        ([" ".join(map(str, row.tolist())) for row in words], _Tokenizer()),
    ):
        model = tiny(num_hidden_layers=1)
        preprocess_gptq(model, config(), calibration, tool, length=32, progressbar=False)
        found.append(model.model.layers[0].self_attn.q_proj.codes)
    for codes in found[1:]:
        assert (codes == found[0]).float().mean() > 0.99  # the windows' sums are added up in another order


class _Tokenizer:
    eos_token_id = None

    def __call__(self, text: str) -> dict:
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.mark.parametrize(
    ("options", "calibration", "match"),
    [
        ({}, [], "`calibration` is empty"),
        ({}, ["some text"], "give a `tokenizer`"),
        ({"target_modules": ["q_proj", "lm_head"]}, TEXT, "not all inside one list of blocks"),
        ({"group_size": 5}, TEXT, "does not divide"),
    ],
)
def test_what_is_refused_changes_nothing(options: dict, calibration: list, match: str):
    model = tiny()
    before = logits(model, IDS)
    with pytest.raises(ValueError, match=match):
        preprocess_gptq(model, config(**options), calibration, progressbar=False)
    assert torch.equal(logits(model, IDS), before)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_gpt2_and_a_quantized_model_are_refused():
    with pytest.raises(ValueError, match=r"Conv1D; GPTQ here is for nn.Linear"):
        preprocess_gptq(tiny("gpt2"), config(), TEXT, progressbar=False)
    model = tiny()
    preprocess_gptq(model, config(), TEXT, progressbar=False)
    with pytest.raises(ValueError, match="quantized already"):
        preprocess_gptq(model, config(), TEXT, progressbar=False)


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "gate_proj", "up_proj", "down_proj"], ["q_proj", "experts"]], ids=str
)
def test_experts_are_refused_before_anything_is_done(targets: str | list[str]):
    model = mixture()
    before = logits(model, tokens(1, 4))
    config = LRQATConfig(bits=4, group_size=8, target_modules=targets)
    with pytest.raises(ValueError, match=r"means the experts of 2 layers.*exclude_modules=\['experts'\]"):
        preprocess_gptq(model, config, [tokens(1, 8)], progressbar=False)
    assert torch.equal(logits(model, tokens(1, 4)), before)


def test_a_mixture_whose_experts_are_left_out():
    config = LRQATConfig(bits=4, group_size=8, exclude_modules=["experts"])
    model = preprocess_gptq(mixture(), config, [tokens(2, 8)], progressbar=False)
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantizedLinear)
    expected = logits(model, tokens(1, 4))
    with pytest.warns(UserWarning, match="Most of the model stays float"):
        model = get_peft_model(model, config).eval()
    assert torch.equal(logits(model, tokens(1, 4)), expected)
