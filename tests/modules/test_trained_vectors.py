"""Norms that are trained beside an adapter of a bf16 model: fp32 in training, and what is served in every forward."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_lrqat import export
from peft_lrqat.checkpoint.model_source import ModelSource
from peft_lrqat.modules.trained_vectors import TrainedVectors, settle_vectors, train_in_fp32
from tests import lowbit_sr, lrqat
from tests.models import logits, reload_clean, tiny, tokens, train

IDS = tokens()
LR = 1e-3  # less than half of what lies between two numbers of bf16 at 1
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}


def base(family: str = "llama") -> PreTrainedModel:
    return tiny(family, dtype=torch.bfloat16, **WIDE)


def trained(method: ModuleType, family: str = "llama", **options: Any) -> PeftModel:
    model = method.adapt(base(family), **{**method.GRID, "modules_to_save": ["norm"], **options})
    train(model, IDS, lr=LR)
    return model


def norms(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if "norm" in name}


@pytest.fixture(params=[lrqat, lowbit_sr], ids=["lrqat", "lowbit_sr"])
def method(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_norms_that_were_trained_are_those_that_are_served(method: ModuleType, family: str, tmp_path: Path):
    model = trained(method, family)
    own = {name.removeprefix("base_model.model."): tensor for name, tensor in norms(model).items()}
    moved = {name: tensor for name, tensor in own.items() if "modules_to_save" in name}
    assert len(moved) == {"llama": 3, "qwen3": 5, "gemma3": 7}[family]
    for name, tensor in moved.items():
        start = own[name.replace("modules_to_save.default", "original_module")]
        assert tensor.dtype == torch.float32
        assert (tensor != start.float()).float().mean() > 0.9
    expected = logits(model, IDS)
    assert expected.dtype == torch.bfloat16
    with model.disable_adapter():
        start = logits(model, IDS)
    assert not torch.equal(start, expected)

    model.save_pretrained(tmp_path / "adapter")
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(base(family), tmp_path / "adapter", **options).eval()
        assert torch.equal(logits(again, IDS), expected)
    halves = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
    found = norms(PeftModel.from_pretrained(base(family), tmp_path / "adapter", **halves))
    assert all(torch.equal(tensor, norms(model)[name].bfloat16()) for name, tensor in found.items())
    again = PeftModel.from_pretrained(base(family), tmp_path / "adapter", is_trainable=True)
    assert all(torch.equal(tensor, norms(model)[name]) for name, tensor in norms(again).items())

    served = dict(ModelSource(model).floats())  # of which every format is written
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, IDS), expected)
    for name, tensor in norms(merged).items():
        master = own[name.removesuffix("weight") + "modules_to_save.default.weight"]
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, master.bfloat16())
        assert torch.equal(served[name], tensor)
    assert not any(isinstance(module, TrainedVectors) for module in merged.modules())
    merged.save_pretrained(tmp_path / "merged")
    for card in ("adapter", "merged"):
        assert "trained in float beside: norm" in (tmp_path / card / "README.md").read_text()
    assert torch.equal(reload_clean([tmp_path / "merged"], IDS, tmp_path)[0].to(expected.dtype), expected)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_a_model_with_adapters_is_exported_with_its_norms(method: ModuleType, format: str, tmp_path: Path):
    model = trained(method, group_size=32, r=2) if method is lrqat else trained(method, group_size=32)
    export(model, tmp_path / "out", format=format)
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = norms(model.merge_and_unload())
    assert expected
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_updates_of_bf16_numbers_are_not_lost(method: ModuleType):
    """Ten updates of 1e-3, each of which bf16 would round away."""
    model = trained(method)
    norm = model.base_model.model.model.norm.modules_to_save["default"]
    norm.weight.data.fill_(1.0)
    for _ in range(10):
        norm.weight.data.add_(LR)
    assert torch.equal(norm(torch.ones(1, 64, dtype=torch.bfloat16)), torch.full((1, 64), 1.0078125).bfloat16())


def test_the_base_is_what_it_was(method: ModuleType):
    """PEFT's `unload` would leave what was trained."""
    start = norms(base())
    model = trained(method)
    with model.disable_adapter():
        expected = logits(model, IDS)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, IDS), expected)
    assert all(torch.equal(tensor, start[name]) for name, tensor in norms(unloaded).items())


def test_adapters_have_their_own_norms(method: ModuleType):
    model = trained(method)
    expected = logits(model, IDS)
    model.add_adapter("other", method.config(modules_to_save=["norm"]))
    model.set_adapter("other")
    train(model, IDS, lr=LR, steps=2)
    other = logits(model, IDS)
    model.set_adapter("default")
    assert torch.equal(logits(model, IDS), expected)
    model.merge_adapter()
    assert torch.equal(logits(model, IDS), expected)
    model.unmerge_adapter()
    model.set_adapter("other")
    assert torch.equal(logits(model, IDS), other)
    model.delete_adapter("default")
    assert torch.equal(logits(model.merge_and_unload(), IDS), other)


@pytest.mark.parametrize("cast", ["float", "half"])
def test_a_model_that_is_cast_serves_what_it_was_cast_to(cast: str):
    model = getattr(trained(lrqat), cast)()
    expected = logits(model, IDS)
    assert expected.dtype == {"float": torch.float32, "half": torch.float16}[cast]
    assert torch.equal(logits(model.merge_and_unload(), IDS), expected)


@pytest.mark.parametrize(
    ("kind", "options"), [("Mamba", {}), ("Mamba2", {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8})]
)
def test_a_weight_that_the_model_reads_outside_of_the_norm_is_what_is_served(kind: str, options: dict):
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    size = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 8, "expand": 2}
    config = getattr(transformers, kind + "Config")(**size, **special, **options)
    model = lrqat.adapt(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), modules_to_save=["norm"], r=0)
    train(model, IDS, lr=LR)
    (norm, *_) = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    assert norm.weight.dtype == torch.bfloat16
    assert norm.modules_to_save["default"].weight.dtype == torch.float32
    expected = logits(model, IDS)
    assert torch.equal(logits(model.merge_and_unload(), IDS), expected)


def test_copies_and_files_of_the_whole_model(method: ModuleType):
    model = trained(method)
    expected = logits(model, IDS)
    assert torch.equal(logits(copy.deepcopy(model), IDS), expected)
    file = io.BytesIO()
    torch.save(model.base_model.model.model.norm, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(again(x), model.base_model.model.model.norm(x))


def test_a_forward_that_others_put_in_place_finds_what_is_served():
    """As Liger's kernels do; and FSDP1 and DataParallel put tensors where parameters were."""
    norm = nn.LayerNorm(4).bfloat16()
    train_in_fp32(norm)
    norm.weight.data.fill_(1.001)
    norm.forward = lambda x: norm.weight
    assert torch.equal(norm(None), torch.ones(4).bfloat16())
    assert norm.weight.dtype == torch.float32
    del norm.forward
    x = torch.randn(2, 4).bfloat16()
    expected = norm(x)
    weight = norm._parameters.pop("weight")
    object.__setattr__(norm, "weight", weight.detach())
    assert torch.equal(norm(x), expected)
    assert norm.weight.dtype == torch.float32


@pytest.mark.parametrize("when", ["before", "in training"])
def test_a_forward_that_others_put_in_place_stays_after_training(when: str):
    norm = nn.LayerNorm(4).bfloat16()
    if when == "in training":
        train_in_fp32(norm)
    norm.forward = lambda x: norm.weight + x
    train_in_fp32(norm)
    norm.weight.data.fill_(1.001)
    expected = torch.full((4,), 3.0).bfloat16()
    assert torch.equal(norm(torch.full((4,), 2.0).bfloat16()), expected)
    settle_vectors(norm)
    assert type(norm) is nn.LayerNorm
    assert norm.weight.dtype == torch.bfloat16
    assert torch.equal(norm(torch.full((4,), 2.0).bfloat16()), expected)


@pytest.mark.parametrize(
    "module", [nn.LayerNorm(4), nn.Linear(4, 4).bfloat16(), nn.Sequential(nn.LayerNorm(4)).bfloat16(), nn.Identity()]
)
def test_other_modules_stay_what_they_are(module: nn.Module):
    kind, dtypes = type(module), [p.dtype for p in module.parameters()]
    train_in_fp32(module)
    assert type(module) is kind
    assert [p.dtype for p in module.parameters()] == dtypes


def test_a_model_that_transformers_manages_has_the_norms_that_are_served(tmp_path: Path):
    model = trained(lrqat)
    model.save_pretrained(tmp_path / "adapter")
    expected = norms(model.merge_and_unload())
    base().save_pretrained(tmp_path / "base")
    managed = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    managed.load_adapter(str(tmp_path / "adapter"))
    for name, tensor in expected.items():
        assert torch.equal(managed.get_submodule(name.removesuffix(".weight")).weight, tensor)
