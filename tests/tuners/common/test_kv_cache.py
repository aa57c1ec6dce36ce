"""`kv_bits`: what is trained with a rounded KV cache is what is merged, saved and loaded, by either rule."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_lrqat import LRQATConfig, can_export, export, load_quantized
from peft_lrqat.checkpoint.inspect import inspect
from peft_lrqat.checkpoint.verify import verify
from peft_lrqat.formats import compressed_tensors
from peft_lrqat.modules.kv_cache import find_rounding, round_cache, rounding_of
from peft_lrqat.ops.kv_cache import CacheRounding
from tests import lrqat
from tests.models import logits, tiny, train

RULES = {"transformers": CacheRounding(4, "transformers", 8), "vllm": CacheRounding(4, "vllm")}


def train_with(method: ModuleType, rule: str, folder: Path) -> SimpleNamespace:
    """A trained model, its logits, and folders: its base's, its adapter's, its merged checkpoint's."""
    tiny().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = method.adapt(base, **method.GRID, kv_bits=4, kv_rule=rule)
    train(model, method.IDS)
    model.save_pretrained(folder / "adapter")
    found = SimpleNamespace(model=model, folder=folder, logits=logits(model, method.IDS), rule=rule)
    found.merged = copy.deepcopy(model).merge_and_unload()
    found.merged.save_pretrained(folder / "merged")
    return found


@pytest.fixture(scope="module")
def trained(method: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One rule by each method; `test_either_rule_with_either_method` has the others."""
    return train_with(method, "transformers" if method is lrqat else "vllm", tmp_path_factory.mktemp("trained"))


@pytest.mark.slow
def test_either_rule_with_either_method(method: ModuleType, tmp_path: Path):
    other = train_with(method, "vllm" if method is lrqat else "transformers", tmp_path)
    test_trained_is_merged_is_reloaded(method, other)
    test_what_transformers_does(method, other)


def test_trained_is_merged_is_reloaded(method: ModuleType, trained: SimpleNamespace):
    assert torch.equal(logits(trained.merged, method.IDS), trained.logits)
    again = load_quantized(trained.folder / "merged").eval()
    assert rounding_of(again) == RULES[trained.rule]
    assert torch.equal(logits(again, method.IDS), trained.logits)
    adapter = AutoPeftModelForCausalLM.from_pretrained(trained.folder / "adapter").eval()
    assert torch.equal(logits(adapter, method.IDS), trained.logits)
    assert PeftConfig.from_pretrained(trained.folder / "adapter").kv_bits == 4


def test_what_transformers_does(method: ModuleType, trained: SimpleNamespace):
    """It rounds by its own rule, and by no other; on such a model one can go on training, by the same rule."""
    plain = AutoModelForCausalLM.from_pretrained(trained.folder / "merged").eval()
    found = copy.deepcopy(logits(plain, method.IDS))
    assert torch.equal(found, trained.logits) == (trained.rule == "transformers")
    with torch.no_grad():
        generated = plain.generate(method.IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    expected = trained.merged.generate(method.IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, expected) or trained.rule == "vllm"
    adopted = get_peft_model(plain, LoraConfig(target_modules=["q_proj"])).eval()
    assert rounding_of(adopted) == RULES[trained.rule]
    assert adopted.config.quantization_config == trained.merged.config.quantization_config
    assert torch.equal(logits(adopted, method.IDS), trained.logits)
    adopted(input_ids=method.IDS, labels=method.IDS).loss.backward()


def test_the_file_says_it(trained: SimpleNamespace):
    config = json.loads((trained.folder / "merged" / "config.json").read_text())
    done, scheme = RULES[trained.rule], config["quantization_config"]["kv_cache_scheme"]
    assert config["peft_lrqat"]["kv_cache"] == done.entry()
    expected = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8, "dynamic": True}
    assert scheme == (expected if trained.rule == "transformers" else None)
    assert "KV cache" in (card := (trained.folder / "merged" / "README.md").read_text())
    assert "int4_per_token_head" in card if trained.rule == "vllm" else "vLLM refuses" in card
    found = inspect(trained.folder / "merged")
    assert found.kv_cache == done.describe()
    vllm = {one.name: one for one in found.engines if "GPU" in one.name}["vLLM on a GPU"]
    assert vllm.loads == (trained.rule == "vllm")


def test_what_is_exported_and_verified(method: ModuleType, trained: SimpleNamespace, tmp_path: Path):
    report = export(trained.model, tmp_path / "out", "compressed-tensors")
    assert any("KV cache" in note for note in report.notes)
    assert torch.equal(logits(load_quantized(tmp_path / "out").eval(), method.IDS), trained.logits)
    found = verify(tmp_path / "out", trained.model)
    assert found, found
    assert found.engine
    assert "KV cache" in [finding.what for finding in found.findings]
    check = can_export(trained.model, "gptq")
    assert ("transformers keeps it in floats with GPTQ" in str(check)) == (trained.rule == "transformers")


def test_without_an_adapter_it_rounds_and_unloaded_it_does_not(method: ModuleType, base):
    """As `act_bits` of LR-QAT: the base at step 0 has the options of its adapters."""
    floats = logits(base, method.IDS)
    model = method.adapt(base, **method.GRID, kv_bits=8, kv_rule="vllm").eval()
    with model.disable_adapter():
        rounded = logits(model, method.IDS)
    assert not torch.equal(rounded, floats)
    model.merge_adapter()
    assert rounding_of(model) == CacheRounding(8, "vllm")
    weight = next(value for name, value in model.named_parameters() if "q_proj" in name)
    with pytest.raises(ValueError, match="rounds its KV cache"):
        weight.full_tensor()
    model.unmerge_adapter()
    assert torch.equal(logits(model.unload(), method.IDS), floats)


def test_one_cache_for_all_adapters(method: ModuleType, base):
    model = method.adapt(base, **method.GRID, kv_bits=8)
    with pytest.raises(ValueError, match="KV cache is rounded to 8 bits per token and head"):
        model.add_adapter("other", method.config(target_modules=method.ATTENTION))
    model.add_adapter("other", method.config(target_modules=method.ATTENTION, kv_bits=8))
    assert len(model.base_model.model.model.layers[0].self_attn._forward_pre_hooks) == 1


def test_a_base_that_rounds_its_cache_keeps_it(method: ModuleType, trained: SimpleNamespace, tmp_path: Path):
    base = load_quantized(trained.folder / "merged").eval()
    options = {"scale_dtype": "auto", **method.GRID}
    with pytest.raises(ValueError, match=r"but the adapter has 8 bits by the rule of"):
        method.adapt(base, **options, kv_bits=8, kv_rule=trained.rule)
    assert torch.equal(logits(base, method.IDS), trained.logits)
    model = method.adapt(base, **options).eval()
    assert (model.peft_config["default"].kv_bits, model.peft_config["default"].kv_rule) == (4, trained.rule)
    assert torch.equal(logits(model, method.IDS), trained.logits)
    assert torch.equal(logits(model.unload(), method.IDS), trained.logits)


def test_an_error_leaves_no_rounding_behind(method: ModuleType, base, monkeypatch: pytest.MonkeyPatch):
    floats = logits(base, method.IDS)
    with pytest.raises(ValueError, match=r"a Conv1D \(GPT-2\), as is every targeted module"):
        method.adapt(tiny("gpt2"), group_size=-1, kv_bits=8, kv_rule="vllm")
    with pytest.raises(ValueError, match="has cross-attention"):
        method.adapt(tiny("gpt2", add_cross_attention=True), group_size=-1, kv_bits=8)
    monkeypatch.setattr("peft_lrqat.tuners.common.model.use_lean_loss", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        method.adapt(base, **method.GRID, kv_bits=8)
    assert rounding_of(base) is None
    assert torch.equal(logits(base, method.IDS), floats)


def test_it_is_said_once(method: ModuleType, base, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="peft_lrqat"):
        method.adapt(base, **method.GRID, kv_bits=8, kv_rule="vllm")
    said = [record.message for record in caplog.records if "KV cache" in record.message]
    assert len(said) == 1
    assert "--kv-cache-dtype int8_per_token_head" in said[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": 2}, "`kv_bits` is 2; allowed are None, 8, 4"),
        ({"kv_bits": 8, "kv_rule": "sglang"}, "`kv_rule` is 'sglang'; allowed are 'transformers', 'vllm'"),
    ],
)
def test_options_that_are_refused(method: ModuleType, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        method.config(**options)


def test_schemes_that_are_not_ours_are_refused():
    static = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    for scheme in (static, {**compressed_tensors._CACHE, "num_bits": 5, "group_size": 8}, "int8"):
        with pytest.raises(ValueError, match="a quantized key-value cache"):
            compressed_tensors.cache_rounding({"kv_cache_scheme": scheme})
    assert compressed_tensors.cache_rounding({}) is None


def test_zero_points_keep_transformers_from_rounding(tmp_path: Path):
    """transformers decompresses such a model while it loads, and forgets the cache: that is said, and we load it."""
    config = LRQATConfig(group_size=8, symmetric=False, kv_bits=8, target_modules="all-linear")
    model = get_peft_model(tiny(), config).eval()
    ids = torch.arange(5, 12)[None]
    expected = logits(model, ids)
    with pytest.warns(UserWarning, match="then rounds no KV cache"):
        merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load_quantized(tmp_path), ids), expected)


def test_an_adapter_without_it_is_refused_on_a_base_with_it(method: ModuleType, tmp_path: Path):
    method.random_adapter(tiny()).save_pretrained(tmp_path)
    base = tiny()
    round_cache(base, find_rounding(base, 8, "vllm"), of_base=True)
    with pytest.raises(ValueError, match="but the adapter has floats"):
        PeftModel.from_pretrained(base, tmp_path)
