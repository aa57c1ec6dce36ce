"""A model that comes in block by block is left as the one that was loaded whole, bit for bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_lrqat import LRQATConfig, load_quantized, preprocess_blockwise, preprocess_gptq
from peft_lrqat.calibration import blockwise as blocks
from peft_lrqat.calibration import offloaded, preprocess
from peft_lrqat.modules.packed import QuantizedLinear
from peft_lrqat.tuners.common.plain import is_offloaded
from tests.models import logits, tiny, tokens

IDS = tokens()
TEXT = [tokens(4, 16, seed=seed) for seed in range(2, 5)]
CONFIG = LRQATConfig(bits=3, group_size=8, range_method="minmax", target_modules="all-linear", task_type="CAUSAL_LM")


def gptq(model: Any, text: Any = TEXT, **options: Any) -> Any:
    return preprocess_gptq(model, CONFIG, text, progressbar=False, **options)


def blockwise(model: Any, text: Any = TEXT, **options: Any) -> Any:
    return preprocess_blockwise(model, CONFIG, text, progressbar=False, epochs=1, batch=8, **options)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict((*model.named_parameters(), *model.named_buffers()))


def equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


@pytest.fixture(scope="module", params=["llama", "opt"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in shards, with tied embeddings: Llama's blocks return a tensor, OPT's a tuple."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny(request.param, tie=True).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("method", [gptq, blockwise])
def test_a_folder_gives_what_the_loaded_model_gives(method: Callable, folder: Path, tmp_path: Path):
    expected, model = load(folder), method(folder, model_init_kwargs={"dtype": torch.bfloat16})
    assert method(expected) is expected
    assert equal(model, expected)
    assert model.config.to_dict() == expected.config.to_dict()
    assert torch.equal(logits(model, IDS), logits(expected, IDS))
    # it is like any other: it moves, is saved, and is trained
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.to("cpu").save_pretrained(tmp_path)
    assert torch.equal(logits(load_quantized(tmp_path), IDS), logits(expected, IDS))
    assert torch.equal(logits(get_peft_model(model, CONFIG), IDS), logits(get_peft_model(expected, CONFIG), IDS))


def test_nobody_is_warned_of_blocks_that_are_offloaded_here(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    gptq(folder)
    assert not caplog.records
    load(folder, device_map={"": "disk"}, offload_folder=tmp_path)  # accelerate warns who did it themselves
    assert "Some parameters are on the meta device" in caplog.text


def test_one_block_is_float_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch):
    seen, arrive = [], offloaded.arrive
    came: list[weakref.ref] = []

    def watched(model: Any, block: Any, *args: Any) -> dict[str, nn.Linear]:
        left = sum(one() is not None for one in came)
        found = arrive(model, block, *args)
        weights = [p for p in block.parameters() if p.ndim == 2]
        came.extend(map(weakref.ref, weights))
        seen.append((left, len(weights)))
        return found

    monkeypatch.setattr(preprocess, "arrive", watched)
    monkeypatch.setattr(blocks, "arrive", watched)
    for method in (gptq, blockwise):
        model = method(folder)
        assert not any(p.is_meta for p in model.parameters())
    assert [left for left, _ in seen] == [0, 0, 0, 0]
    assert all(count >= 6 for _, count in seen)


def test_a_model_that_was_loaded_offloaded(folder: Path, tmp_path: Path):
    expected = load(folder)
    blocks = next(name for name, module in expected.named_modules() if isinstance(module, nn.ModuleList))
    others = {name: "cpu" for name, module in expected.named_modules() if not name.startswith(blocks + ".")}
    others = {name: place for name, place in others.items() if name and not blocks.startswith(name)}
    model = load(folder, device_map={**others, blocks: "disk"}, offload_folder=tmp_path / "offload")
    assert is_offloaded(model)
    resumed = tmp_path / "blocks"
    assert blockwise(model, resume_from=resumed) is model
    assert not is_offloaded(model)
    assert len(list(resumed.glob("block-*"))) == 2
    assert equal(model, blockwise(expected, resume_from=resumed))  # whose weights have the same checksums


def test_a_part_of_the_layers(folder: Path):
    config = LRQATConfig(**{**CONFIG.to_dict(), "peft_type": None, "target_modules": ["q_proj"]})
    options = {"dtype": torch.bfloat16}
    model, expected = preprocess_gptq(folder, config, TEXT, progressbar=False, model_init_kwargs=options), load(folder)
    preprocess_gptq(expected, config, TEXT, progressbar=False)
    assert equal(model, expected)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 2


def test_what_is_refused(folder: Path):
    with pytest.raises(ValueError, match="`model` is one already"):
        gptq(tiny(), model_init_kwargs={})
    with pytest.raises(ValueError, match=r"device map 'balanced'.*Name that"):
        gptq(folder, model_init_kwargs={"device_map": "balanced"})
    wide = LRQATConfig(bits=3, group_size=5, target_modules="all-linear")
    with pytest.raises(ValueError, match="does not divide"):  # before any weight is read
        preprocess_gptq(folder, wide, TEXT, progressbar=False)


@pytest.mark.parametrize("quantize", [gptq, blockwise])
def test_what_is_no_model_and_no_folder(quantize: Callable, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"^There is no folder '.*none'; a repository of the Hub is called"):
        quantize(tmp_path / "none")
    with pytest.raises(ValueError, match="`model` is 3; it must be a model, a folder, or the name of a repository"):
        quantize(3)


def test_a_damaged_weight_is_found_when_its_block_comes_in(tmp_path: Path):
    tiny().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.* holds NaN"):
        gptq(tmp_path)


def test_a_cuda_build_of_torch_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert offloaded._device("auto") == "cpu"
