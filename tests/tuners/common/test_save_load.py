"""A saved adapter reloads to the same integers, by every route that PEFT and transformers offer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_propagation, enable_propagation

from tests.models import logits, tiny, tokens, train

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
OF_TRANSFORMERS = ("transformers", "load_adapter")


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
    method: ModuleType, base_folder: Path, trained, route: str, caplog: pytest.LogCaptureFixture
):
    folder, expected, integers = trained
    enable_propagation()
    try:
        model = ROUTES[route](base_folder, folder).eval()
    finally:
        disable_propagation()
    stray = {line.split()[0] for line in caplog.text.splitlines() if "| UNEXPECTED |" in line}
    # transformers reads a file by itself, and has no place for the checksum (docs/guides/adapters.md)
    assert [key.partition("_")[2] for key in stray] == ["base_checksum.default"] * (route in OF_TRANSFORMERS)
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


def test_low_cpu_mem_usage_rounds_nothing_to_the_models_dtype(method: ModuleType, tmp_path: Path):
    """PEFT casts what it has loaded to the base's dtype, where it was fp32 in the file."""
    options = {**OPTIONS, **({"learn_scales": True} if method.NAME == "Low-bit SR" else {})}
    model = method.adapt(tiny(dtype=torch.bfloat16), **options)
    train(model, IDS)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=True).eval()
    assert all(torch.equal(a, b) for a, b in zip(method.integers(again), method.integers(model), strict=True))
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    assert not any(p.requires_grad for p in again.parameters())


def test_with_low_cpu_mem_usage_the_adapter_is_the_tensors_of_the_file(
    method: ModuleType, trained, monkeypatch: pytest.MonkeyPatch
):
    folder, _, _ = trained
    lazy = inject_adapter_in_model(method.config(**OPTIONS), tiny(), low_cpu_mem_usage=True)
    state = get_peft_model_state_dict(lazy)
    assert len(state) >= 28
    assert all(tensor.is_meta for tensor in state.values())
    assert not any(p.is_meta for layer in method.layers(lazy).values() for p in layer.frozen.parameters())

    read: dict[str, torch.Tensor] = {}
    load_weights = peft_model.load_peft_weights
    monkeypatch.setattr(peft_model, "load_peft_weights", lambda *a, **kw: read.update(load_weights(*a, **kw)) or read)
    model = PeftModel.from_pretrained(tiny(), folder, low_cpu_mem_usage=True)
    places = {tensor.untyped_storage().data_ptr() for tensor in read.values()}
    state = get_peft_model_state_dict(model)
    own = {key: tensor for key, tensor in state.items() if not key.endswith("_base_checksum")}
    assert len(own) == len(state) - 1 >= 28
    assert all(tensor.untyped_storage().data_ptr() in places for tensor in own.values())  # one copy, not two


def test_one_configuration_serves_several_models(method: ModuleType, tmp_path: Path):
    """... which are alive at the same time: it is not written to, and each adapter knows its own base."""
    config = method.config(task_type="CAUSAL_LM")
    before = copy.deepcopy(config)
    models = [get_peft_model(tiny(seed=seed), config).eval() for seed in (0, 1)]
    assert config == before
    for seed, model in enumerate(models):
        model.save_pretrained(tmp_path / str(seed))
        again = PeftModel.from_pretrained(tiny(seed=seed), tmp_path / str(seed)).eval()
        assert torch.equal(logits(again, IDS), logits(model, IDS))
        with pytest.raises(ValueError, match="trained on another base model: its float weights"):
            PeftModel.from_pretrained(tiny(seed=1 - seed), tmp_path / str(seed))
        # into an adapter that exists, as Trainer resumes: only the tensors are read
        other = models[1 - seed]
        expected = logits(other, IDS)
        with pytest.raises(ValueError, match="trained on another base: its integers have the checksum"):
            other.load_adapter(tmp_path / str(seed), adapter_name="default")
        assert torch.equal(logits(other, IDS), expected)


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
    (whole,) = (key for key in values if key.endswith("_base_checksum"))
    assert {key.split("proj.")[-1] for key in values} == {*method.STORED, whole}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == method.TYPE
    assert (config["bits"], config["group_size"]) == (3, 8)
    assert isinstance(PeftConfig.from_pretrained(folder), type(method.config()))
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "import peft_lrqat" in card
    assert f"KeyError: '{method.TYPE}'" in card


@pytest.mark.parametrize("end", ["merge_and_unload", "unload"])
def test_nothing_is_saved_over_an_adapter_whose_layers_are_gone(method: ModuleType, end: str, tmp_path: Path):
    """A Trainer's `save_model()` after `merge_and_unload()`: PEFT would write a file without a tensor."""
    model = method.random_adapter(tiny())
    model.save_pretrained(tmp_path)
    files = [tmp_path / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    before = [file.read_bytes() for file in files]
    getattr(model, end)()
    with pytest.raises(ValueError, match=r"Adapter 'default' cannot be saved: the model has no layer of it any more"):
        model.save_pretrained(tmp_path)
    assert [file.read_bytes() for file in files] == before


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
