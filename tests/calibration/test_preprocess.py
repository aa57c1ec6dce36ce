"""A float model, quantized on calibration text, as the base of LR-QAT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_lrqat import LowBitSRConfig, LRQATConfig, load_quantized, preprocess_blockwise, preprocess_gptq
from peft_lrqat.calibration.gptq import gptq_round
from peft_lrqat.modules.packed import QuantizedLinear
from tests.mixtures import CHOSEN, EXPERTS, FIRST, mixture
from tests.models import adapted, logits, tiny, tokens, train
from tests.tokenizers import bytewise

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
    ("options", "calibration", "settings", "match"),
    [
        ({}, [], {}, "`calibration` is empty"),
        ({}, ["some text"], {}, "give a `tokenizer`"),
        ({}, ["some text"], {"tokenizer": "a name"}, "`tokenizer` is 'a name'; it must be a tokenizer"),
        ({}, TEXT, {"length": 0}, "`length` is 0; it must be an integer, 1 or more"),
        ({}, TEXT, {"damping": -1}, "`damping` is -1; it must be a positive number"),
        ({"target_modules": ["q_proj", "lm_head"]}, TEXT, {}, "not all inside one list of blocks"),
        ({"target_modules": ["q_projection"]}, TEXT, {}, r"no module of this model is called so.* 'q_proj'"),
        ({"group_size": 5}, TEXT, {}, "does not divide"),
    ],
)
def test_what_is_refused_changes_nothing(options: dict, calibration: list, settings: dict, match: str):
    model = tiny()
    before = logits(model, IDS)
    with pytest.raises(ValueError, match=match):
        preprocess_gptq(model, config(**options), calibration, progressbar=False, **settings)
    assert torch.equal(logits(model, IDS), before)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_gpt2_and_a_quantized_model_are_refused():
    with pytest.raises(ValueError, match=r"Conv1D; GPTQ here is for nn.Linear"):
        preprocess_gptq(tiny("gpt2"), config(), TEXT, progressbar=False)
    model = tiny()
    preprocess_gptq(model, config(), TEXT, progressbar=False)
    with pytest.raises(ValueError, match="quantized already"):
        preprocess_gptq(model, config(), TEXT, progressbar=False)


def of_mixture(options: dict | None = None, model: nn.Module | None = None, calibration=TEXT) -> nn.Module:
    wanted = config(**{"bits": 3, "target_modules": ["experts"], **(options or {})})
    model = mixture(num_hidden_layers=1) if model is None else model
    return preprocess_gptq(model, wanted, calibration, progressbar=False)


def stacks(model: nn.Module) -> dict[str, list[QuantizedLinear]]:
    """Projection -> the layers of each expert, in the order of its rows."""
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    return {
        projection: [model.get_submodule(f"{FIRST}.{e}.{name}") for e in range(EXPERTS) for name in names]
        for projection, names in parts.items()
    }


@pytest.mark.parametrize(
    "options", [{}, {"bits": 2, "group_size": 8, "symmetric": False}, {"target_modules": "all-linear"}], ids=str
)
def test_experts(options: dict, tmp_path: Path):
    wanted, text = config(**{"bits": 3, "target_modules": ["experts"], **options}), torch.cat(TEXT)
    peft_model = get_peft_model(of_mixture(options), wanted)
    rounded = get_peft_model(mixture(num_hidden_layers=1), wanted)
    expected = logits(mixture(num_hidden_layers=1), text)
    error, of_rounding = ((logits(m, text) - expected).pow(2).mean() for m in (peft_model, rounded))
    assert error < 0.9 * of_rounding
    start = logits(peft_model, IDS)
    base = peft_model.unload()
    base.save_pretrained(tmp_path / "base")
    again = get_peft_model(load_quantized(tmp_path / "base"), wanted)
    assert torch.equal(logits(again, IDS), start)
    merged = again.merge_and_unload()
    assert torch.equal(logits(merged, IDS), start)
    pairs = zip(merged.modules(), of_mixture(options).modules(), strict=True)
    assert all(torch.equal(a.codes, b.codes) for a, b in pairs if isinstance(a, QuantizedLinear))
    if wanted.symmetric:  # transformers reads no zero points of experts
        merged.save_pretrained(tmp_path / "merged")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), IDS), start)


def codes_of(weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    wanted = config(bits=3)
    how = {"range_method": wanted.range_method or "lp", "signed_scales": wanted.signed_scales}
    return gptq_round(weight, inputs.t() @ inputs, wanted.grid, **how).codes


@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
def test_each_expert_goes_by_the_tokens_that_it_gets(how: str):
    """Padding is nobody's token, and whichever function of transformers multiplies makes no difference."""
    words = torch.cat(TEXT)
    model = mixture(num_hidden_layers=1)
    module, routed = model.get_submodule(FIRST), []
    module.register_forward_pre_hook(lambda module, args: routed.append(args))
    logits(model, words)
    ((x, chosen, _),) = routed
    padded = {
        "input_ids": torch.nn.functional.pad(words, (0, 3), value=5),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(words), (0, 3)),
    }
    found = stacks(of_mixture(model=mixture(num_hidden_layers=1, how=how), calibration=[padded]))
    for e in range(EXPERTS):
        own = x[(chosen == e).any(1)]
        assert len(own) > 32
        gate_up, down = module.gate_up_proj[e], module.down_proj[e]
        gate, up = torch.nn.functional.linear(own, gate_up).chunk(2, -1)
        of_each = {"gate_up_proj": (gate_up, own), "down_proj": (down, module.act_fn(gate) * up)}
        for projection, (weight, inputs) in of_each.items():
            expected = codes_of(weight, inputs)
            count = len(found[projection]) // EXPERTS
            codes = torch.cat([layer.codes for layer in found[projection][e * count : (e + 1) * count]])
            assert (codes == expected).float().mean() > 0.99  # sums in another order


def test_an_expert_that_few_tokens_reached_has_the_mean_of_the_others_for_the_rest():
    def model() -> nn.Module:
        made = mixture(num_hidden_layers=1)
        gate = made.model.layers[0].mlp.gate.weight.data
        gate[:] = gate[0] * torch.tensor([1, -1, 2, -2, 0.5]).unsqueeze(1)  # of the last others are always ahead
        return made

    made, routed = model(), []
    module = made.get_submodule(FIRST)
    module.register_forward_pre_hook(lambda module, args: routed.append(args[0].repeat_interleave(CHOSEN, 0)))
    logits(made, torch.cat(TEXT))
    with pytest.warns(UserWarning, match=r"Fewer calibration tokens .* reached 1 in block 0 \(4\)\. "):
        found = stacks(of_mixture(model=model()))
    inputs = torch.cat(routed)
    expected = codes_of(module.gate_up_proj[4], inputs)
    assert (torch.cat([layer.codes for layer in found["gate_up_proj"][-2:]]) == expected).float().mean() > 0.99


def test_a_mixture_that_comes_in_by_blocks(tmp_path: Path):
    mixture().save_pretrained(tmp_path)
    expected = of_mixture(model=AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(logits(of_mixture(model=tmp_path), IDS), logits(expected, IDS))


def test_experts_are_as_they_were_after_an_error():
    model = mixture(num_hidden_layers=1)
    model.model.layers[0].post_attention_layernorm.weight.data[0] = torch.nan
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="NaN"):
        of_mixture(model=model)
    assert [type(module) for module in model.modules()] == kinds


def test_low_bit_sr_leaves_experts_float():
    wanted = LowBitSRConfig(bits=3, group_size=8, target_modules="all-linear")
    with pytest.warns(UserWarning, match="stay as they are"):
        model = preprocess_gptq(mixture(num_hidden_layers=1), wanted, TEXT, progressbar=False)
    assert model.get_parameter(f"{FIRST}.down_proj").ndim == 3
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantizedLinear)


def test_a_mixture_whose_experts_are_left_out():
    config = LRQATConfig(bits=4, group_size=8, exclude_modules=["experts"])
    model = preprocess_gptq(mixture(), config, [tokens(2, 8)], progressbar=False)
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantizedLinear)
    expected = logits(model, tokens(1, 4))
    with pytest.warns(UserWarning, match="Most of the model stays float"):
        model = get_peft_model(model, config).eval()
    assert torch.equal(logits(model, tokens(1, 4)), expected)


@pytest.mark.parametrize("preprocess", [preprocess_gptq, preprocess_blockwise])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config": LoraConfig()}, "`config` is .*LoraConfig.*Give an LRQATConfig or a LowBitSRConfig"),
        ({"calibration": []}, "`calibration` is empty"),
        ({"calibration": [torch.tensor([[1, 96]])]}, "has the token id 96, but the model has 96 tokens, from 0"),
        ({"calibration": [torch.tensor([[1, -100]])]}, "has the token id -100, but the model has 96 tokens"),
        ({"calibration": bytewise("gpt-2")}, "`calibration` is of type .*; give a list"),
        ({"calibration": ["a few words"]}, r"`calibration` has \d+ tokens, fewer than one window \(`length=1024`\)"),
        ({"calibration": [{"text": "words"}]}, r"a mapping with \['text'\]; it needs `input_ids`"),
        ({"calibration": [{"input_ids": [1, 2]}]}, "it needs `input_ids`, an int64 tensor"),
        ({"calibration": [[1, 2]]}, r"`calibration` holds \[1, 2\]; it may hold token ids"),
    ],
    ids=str,
)
def test_what_is_no_text_is_named_before_anything_is_changed(preprocess, given: dict, message: str):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        preprocess(model, **{"config": config(bits=3), "calibration": TEXT, "tokenizer": bytewise("gpt-2"), **given})
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
