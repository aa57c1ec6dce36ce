"""A saved adapter reloads to the same model, by every route that PEFT and transformers offer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_lrqat import LRQATConfig
from peft_lrqat.ops.reference import codes
from peft_lrqat.tuners.common.frozen import FrozenWeight
from tests.models import adapted, logits, tiny, tokens, train

IDS = tokens()


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint on disk, as users have one."""
    folder = tmp_path_factory.mktemp("base")
    tiny("llama").save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def all_codes(model: torch.nn.Module) -> list[torch.Tensor]:
    found = []
    for layer in (m for m in model.modules() if hasattr(m, "lora_scale_shift")):
        shift, A, B, c = layer._operands(layer.active_adapters)
        scale = layer._scale(shift)
        found += [codes(layer.frozen.base, A, B, layer.frozen.fmt, c), scale]
    return found


def _lazily(base: Path, folder: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(load(base), folder, low_cpu_mem_usage=True)


def _into_transformers(base: Path, folder: Path) -> torch.nn.Module:
    model = load(base)
    model.load_adapter(str(folder))
    return model


ROUTES: dict[str, Callable[[Path, Path], torch.nn.Module]] = {
    "PeftModel": lambda base, folder: PeftModel.from_pretrained(load(base), folder),
    "low_cpu_mem_usage": _lazily,
    "AutoPeftModel": lambda base, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
    "transformers": lambda base, folder: AutoModelForCausalLM.from_pretrained(folder),
    "load_adapter": _into_transformers,
}


@pytest.fixture(scope="module")
def trained(
    base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.Tensor, list[torch.Tensor]]:
    """A trained adapter's folder, the trained model's logits, and its codes and scales."""
    model = adapted(load(base_folder), bits=3, group_size=8)
    train(model, IDS)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, logits(model, IDS), all_codes(model)


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_the_same_bits(base_folder: Path, trained, route: str):
    folder, expected, integers = trained
    model = ROUTES[route](base_folder, folder).eval()
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(logits(model, IDS), expected)
    assert all(torch.equal(a, b) for a, b in zip(all_codes(model), integers, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "symmetric": False, "group_size": 16},
        {"bits": 4, "group_size": 0, "downcast": "int", "init_lora_weights": "loftq"},
        {"bits": 8, "downcast": "fp16", "learn_scales": False},
        {"bits": 4, "range_method": "minmax", "scale_dtype": "bf16"},
        {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 4, 5]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}, "use_rslora": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option_survives(base_folder: Path, tmp_path: Path, options: dict):
    model = adapted(load(base_folder), **options)
    train(model, IDS, steps=2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(base_folder), tmp_path).eval()
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    saved, here = again.peft_config["default"].to_dict(), model.peft_config["default"].to_dict()
    assert saved == {**here, "inference_mode": True}


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_survive(tmp_path: Path, bias: str):
    base = tiny("qwen2")
    model = adapted(copy.deepcopy(base), target_modules=["q_proj"], bias=bias)
    train(model, IDS)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_several_adapters_are_saved_and_loaded_beside_each_other(base_folder: Path, tmp_path: Path):
    model = adapted(load(base_folder), init_lora_weights=False).eval()
    config = LRQATConfig(group_size=-1, r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter("second", config)
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


def test_an_adapter_goes_on_training_where_it_stopped(base_folder: Path, trained, tmp_path: Path):
    folder, _, _ = trained
    loaded = PeftModel.from_pretrained(load(base_folder), folder, is_trainable=True)
    again = PeftModel.from_pretrained(load(base_folder), folder, is_trainable=True)
    again.save_pretrained(tmp_path)
    third = PeftModel.from_pretrained(load(base_folder), tmp_path, is_trainable=True)
    losses = [train(model, IDS) for model in (loaded, again, third)]
    assert losses[0] == losses[1] == losses[2]
    frozen = PeftModel.from_pretrained(load(base_folder), folder)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_the_file_holds_the_adapter_and_nothing_else(trained):
    folder, _, _ = trained
    values = load_file(folder / "adapter_model.safetensors")
    assert {key.split("proj.")[-1] for key in values} == {
        "lora_A.weight",
        "lora_B.weight",
        "lora_scale_shift",
        "lora_base_checksum",
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LRQAT"
    assert {key: config[key] for key in ("bits", "group_size", "symmetric", "downcast")} == {
        "bits": 3,
        "group_size": 8,
        "symmetric": True,
        "downcast": "fx8",
    }
    assert isinstance(PeftConfig.from_pretrained(folder), LRQATConfig)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "import peft_lrqat" in card


def test_saving_and_loading_build_no_float_weight(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = adapted(load(base_folder))

    def refuse(self: FrozenWeight) -> torch.Tensor:
        raise AssertionError("a float weight was built")

    monkeypatch.setattr(FrozenWeight, "weight", property(refuse))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(load(base_folder), tmp_path)


def test_a_bf16_base_and_its_fp32_copy_are_one_base(tmp_path: Path):
    low = tiny(dtype=torch.bfloat16)
    adapted(copy.deepcopy(low)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(low).float(), tmp_path)
    first, second = adapted(low), model
    assert all(torch.equal(a, b) for a, b in zip(all_codes(first), all_codes(second), strict=True))
