"""A saved adapter reloads to the same integers, by every route that PEFT and transformers offer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_lrqat import LowBitSRConfig
from peft_lrqat.tuners.lowbit_sr import LowBitTensor
from tests.models import logits, low_bit, tiny, tokens, train

IDS = tokens()


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny("llama").save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def inner(model: torch.nn.Module) -> list[torch.Tensor]:
    """Codes, scales and random streams."""
    weights = [p for p in model.parameters() if isinstance(p, LowBitTensor)]
    assert len(weights) == 14
    return [t for p in weights for t in (p.packed, p.scale, p.stream)]


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
def trained(base_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """A trained adapter's folder, the trained model's logits and integers."""
    model = low_bit(load(base_folder), bits=3, group_size=8)
    train(model, IDS)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, logits(model, IDS), inner(model)


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_the_same_bits(base_folder: Path, trained, route: str):
    folder, expected, integers = trained
    model = ROUTES[route](base_folder, folder).eval()
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(logits(model, IDS), expected)
    assert all(torch.equal(a, b) for a, b in zip(inner(model), integers, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 1.58, "group_size": 0, "act_bits": 8},
        {"bits": 2, "group_size": 16, "learn_scales": True, "error_feedback": True, "train_scales": True},
        {"bits": 8, "forward_bits": 1.58, "scale_dtype": "bf16"},
        {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 4, 5]},
        {"keep_base": False, "seed": 5, "exclude_modules": ["down_proj"]},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option_survives(base_folder: Path, tmp_path: Path, options: dict):
    options = {key: value for key, value in options.items() if key != "train_scales"}
    if options.pop("error_feedback", False):
        # the test's AdamW knows nothing of it; the flag itself must survive
        model = low_bit(load(base_folder), **options, error_feedback=True)
    else:
        model = low_bit(load(base_folder), **options)
        train(model, IDS, steps=2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(base_folder), tmp_path).eval()
    assert torch.equal(logits(again, IDS), logits(model.eval(), IDS))
    saved, here = again.peft_config["default"].to_dict(), model.peft_config["default"].to_dict()
    assert saved == {**here, "inference_mode": True}
    feedback = [p.error_feedback for p in again.parameters() if isinstance(p, LowBitTensor)]
    assert set(feedback) == {model.peft_config["default"].error_feedback}


def test_several_adapters_are_saved_and_loaded_beside_each_other(base_folder: Path, tmp_path: Path):
    model = low_bit(load(base_folder), init_weights=False).eval()
    model.add_adapter("second", LowBitSRConfig(target_modules=["q_proj"], init_weights=False))
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = logits(model, IDS)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(base_folder), tmp_path)
    again.load_adapter(tmp_path / "second", adapter_name="other", low_cpu_mem_usage=True)
    assert torch.equal(logits(again, IDS), expected["default"])
    again.set_adapter("other")
    assert torch.equal(logits(again, IDS), expected["second"])


def test_an_adapter_goes_on_training_where_it_stopped(base_folder: Path, trained, tmp_path: Path):
    folder, _, _ = trained
    loaded = PeftModel.from_pretrained(load(base_folder), folder, is_trainable=True)
    again = PeftModel.from_pretrained(load(base_folder), folder, is_trainable=True)
    losses = [train(model, IDS) for model in (loaded, again)]
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(inner(loaded), inner(again), strict=True))
    assert not any(p.requires_grad for p in PeftModel.from_pretrained(load(base_folder), folder).parameters())


def test_the_file_holds_the_adapter_and_nothing_else(trained):
    folder, _, _ = trained
    values = load_file(folder / "adapter_model.safetensors")
    assert {key.split("proj.")[-1] for key in values} == {"lowbitsr_codes", "lowbitsr_scale", "lowbitsr_stream"}
    assert {v.dtype for v in values.values()} == {torch.int32, torch.float32, torch.int64}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LOWBITSR"
    assert (config["bits"], config["group_size"]) == (3, 8)
    assert isinstance(PeftConfig.from_pretrained(folder), LowBitSRConfig)
    card = (folder / "README.md").read_text()
    assert "import peft_lrqat" in card
    assert "KeyError: 'LOWBITSR'" in card


def test_saving_and_loading_build_no_float_weight(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = low_bit(load(base_folder))

    def refuse(self: LowBitTensor) -> torch.Tensor:
        raise AssertionError("a float weight was built")

    monkeypatch.setattr(LowBitTensor, "to_float", refuse)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(load(base_folder), tmp_path)
