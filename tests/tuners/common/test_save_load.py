"""A saved adapter reloads to the same integers, by every route that PEFT and transformers offer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests import lrqat
from tests.models import logits, tokens, train

IDS = tokens()
OPTIONS = {"bits": 3, "group_size": 8}


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _into_transformers(base: Path, folder: Path) -> torch.nn.Module:
    model = load(base)
    model.load_adapter(str(folder))
    return model


ROUTES: dict[str, Callable[[Path, Path], torch.nn.Module]] = {
    "PeftModel": lambda base, folder: PeftModel.from_pretrained(load(base), folder),
    "low_cpu_mem_usage": lambda base, folder: PeftModel.from_pretrained(load(base), folder, low_cpu_mem_usage=True),
    "AutoPeftModel": lambda base, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
    "transformers": lambda base, folder: AutoModelForCausalLM.from_pretrained(folder),
    "load_adapter": _into_transformers,
}


@pytest.fixture(scope="module")
def trained(
    method: ModuleType, base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.Tensor, list[torch.Tensor]]:
    """A trained adapter's folder, the trained model's logits, and its integers."""
    model = method.adapt(load(base_folder), **OPTIONS)
    train(model, IDS)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, logits(model, IDS), method.integers(model)


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_the_same_bits(
    method: ModuleType, base_folder: Path, trained, route: str, capfd: pytest.CaptureFixture
):
    folder, expected, integers = trained
    model = ROUTES[route](base_folder, folder).eval()
    said = capfd.readouterr().err  # where transformers reports tensors that have no place
    assert "UNEXPECTED" not in said
    assert "lora_base_checksum" not in said
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(logits(model, IDS), expected)
    found = method.integers(model)
    assert len(found) >= 28
    assert all(torch.equal(a, b) for a, b in zip(found, integers, strict=True))


def test_several_adapters_are_saved_and_loaded_beside_each_other(method: ModuleType, base_folder: Path, tmp_path: Path):
    model = method.adapt(load(base_folder), **method.MOVED, **OPTIONS).eval()
    model.add_adapter("second", method.other(**OPTIONS, target_modules=["q_proj"]))
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = logits(model, IDS)
    model.save_pretrained(tmp_path)
    assert "second" not in "".join(load_file(tmp_path / "adapter_model.safetensors"))

    again = PeftModel.from_pretrained(load(base_folder), tmp_path)
    again.load_adapter(tmp_path / "second", adapter_name="other", low_cpu_mem_usage=True)
    assert torch.equal(logits(again, IDS), expected["default"])
    again.set_adapter("other")
    assert torch.equal(logits(again, IDS), expected["second"])
    assert {p.device.type for p in again.parameters()} == {"cpu"}


def test_an_adapter_goes_on_training_where_it_stopped(method: ModuleType, base_folder: Path, trained, tmp_path: Path):
    folder, _, _ = trained
    loaded = PeftModel.from_pretrained(load(base_folder), folder, is_trainable=True)
    again = PeftModel.from_pretrained(load(base_folder), folder, is_trainable=True)
    again.save_pretrained(tmp_path)
    third = PeftModel.from_pretrained(load(base_folder), tmp_path, is_trainable=True)
    losses = [train(model, IDS) for model in (loaded, again, third)]
    assert losses[0] == losses[1] == losses[2]
    for a, b in zip(method.integers(loaded), method.integers(third), strict=True):
        assert torch.equal(a, b)
    frozen = PeftModel.from_pretrained(load(base_folder), folder)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_the_file_holds_the_adapter_and_nothing_else(method: ModuleType, trained):
    folder, _, _ = trained
    values = load_file(folder / "adapter_model.safetensors")
    whole = {"base_model.model.lora_base_checksum"} if method is lrqat else set()
    assert {key.split("proj.")[-1] for key in values} == {*method.STORED, *whole}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == method.TYPE
    assert (config["bits"], config["group_size"]) == (3, 8)
    assert isinstance(PeftConfig.from_pretrained(folder), type(method.config()))
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "import peft_lrqat" in card
    assert f"KeyError: '{method.TYPE}'" in card


def test_early_files_whose_scale_shifts_had_another_name_load(method: ModuleType, base_folder: Path, tmp_path: Path):
    model = method.adapt(load(base_folder), **OPTIONS, learn_scales=True)
    train(model, IDS)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    values = load_file(file)
    early = {key.replace("_scale_shift.weight", "_scale_shift"): value for key, value in values.items()}
    assert early.keys() != values.keys()
    save_file(early, file, metadata={"format": "pt"})
    again = PeftModel.from_pretrained(load(base_folder), tmp_path)
    again.load_adapter(tmp_path, adapter_name="second")
    for adapter in ("default", "second"):
        again.set_adapter(adapter)
        assert torch.equal(logits(again.eval(), IDS), logits(model, IDS))
