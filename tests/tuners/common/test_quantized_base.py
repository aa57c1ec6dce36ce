"""Both methods start from a model that is quantized already, and take its integers as they are."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_lrqat import LRQATConfig, load_quantized, preprocess_gptq
from peft_lrqat.modules.packed import QuantizedLinear
from tests import lowbit_sr
from tests.models import adapted, logits, tiny, tokens, train

IDS = tokens(batch=4)
GRID = {"bits": 4, "group_size": 8}


def merged(**options) -> PreTrainedModel:
    """A quantized model whose weights are away from those of `tiny()`."""
    return adapted(tiny(), **{**GRID, **options}, init_lora_weights=False).merge_and_unload()


@pytest.fixture(scope="module")
def quantized_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    merged().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("load", [load_quantized, AutoModelForCausalLM.from_pretrained])
def test_start_train_save_and_reload(method: ModuleType, load, quantized_folder: Path, tmp_path: Path):
    model = load(quantized_folder)
    start = logits(model, IDS)
    peft_model = method.adapt(model, **GRID)
    assert torch.equal(logits(peft_model, IDS), start)
    train(peft_model, IDS, lr=0.1)
    trained = logits(peft_model, IDS)
    assert not torch.equal(trained, start)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, IDS), start)
    peft_model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_quantized(quantized_folder), tmp_path / "adapter")
    assert torch.equal(logits(again, IDS), trained)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), IDS), trained)
    with pytest.raises(ValueError, match="its integers had the fingerprint"):
        PeftModel.from_pretrained(tiny(), tmp_path / "adapter")


def test_a_base_of_integers_that_low_bit_sr_dropped(quantized_folder: Path, tmp_path: Path):
    model = lowbit_sr.adapt(load_quantized(quantized_folder), **GRID, keep_base=False)
    train(model, IDS, lr=0.1)
    trained = logits(model, IDS)
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].base_fingerprint.startswith("int:")
    again = PeftModel.from_pretrained(load_quantized(quantized_folder), tmp_path)
    assert torch.equal(logits(again, IDS), trained)
    assert torch.equal(logits(again.merge_and_unload(), IDS), trained)


@pytest.mark.parametrize("container", [4, 8])
def test_unloading_gives_the_base_back(method: ModuleType, container: int):
    model = merged(container_bits=container)
    before = {name: value.clone() for name, value in model.named_buffers() if "weight_" in name}
    back = method.adapt(model, **GRID).unload()
    found = {name: value for name, value in back.named_buffers() if "weight_" in name}
    assert found.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in found.items())


@pytest.mark.parametrize("container", [4, 8])
def test_merging_keeps_the_container(method: ModuleType, container: int):
    peft_model = method.adapt(merged(container_bits=container), **GRID)
    assert {m.bits for m in peft_model.merge_and_unload().modules() if isinstance(m, QuantizedLinear)} == {container}


def test_fewer_bits_than_the_container_where_every_code_has_them(method: ModuleType):
    start = logits(model := merged(bits=3, container_bits=4), IDS)
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.grid = type(layer.grid)(4, 8)  # as a foreign file has it
    assert torch.equal(logits(method.adapt(model, bits=3, group_size=8), IDS), start)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"group_size": -1}, "asks for group_size=-1, but the base model is quantized with group_size=8"),
        ({"bits": 3}, "asks for bits=3, but the base model is quantized with bits=4"),
        ({"exclude_modules": None, "target_modules": ["q_proj", "lm_head"]}, "1 of the targeted modules are float"),
    ],
)
def test_what_contradicts_the_base(method: ModuleType, options: dict, match: str):
    model = merged()
    start = logits(model, IDS)
    with pytest.raises(ValueError, match=match):
        method.adapt(model, **{**GRID, **options})
    assert torch.equal(logits(model, IDS), start)


def test_scales_that_low_bit_sr_could_not_keep():
    model = merged(scale_dtype="fp32")
    with pytest.raises(ValueError, match=r"`scale_dtype` is 'auto', which does not hold .* Use 'fp32'"):
        lowbit_sr.adapt(model, **GRID)
    start = logits(model, IDS)
    assert torch.equal(logits(lowbit_sr.adapt(model, **GRID, scale_dtype="fp32"), IDS), start)


def test_zero_points_are_for_lr_qat():
    model = merged(symmetric=False)
    with pytest.raises(ValueError, match="asks for symmetric=True, but the base model is quantized with"):
        lowbit_sr.adapt(model, **GRID)
    assert get_peft_model(model, LRQATConfig(target_modules="all-linear")).peft_config["default"].symmetric is False


def test_an_adapter_of_integers_that_no_folder_has_is_warned_of_once(tmp_path: Path):
    """Of a float model's name, the adapter could not be loaded; what the warning says to do works."""
    tiny().save_pretrained(tmp_path / "float")
    config = LRQATConfig(group_size=8, task_type="CAUSAL_LM")

    def made() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
        return preprocess_gptq(model, config, [tokens()], progressbar=False)

    model = get_peft_model(made(), config)
    with pytest.warns(UserWarning, match=r"made in memory, but its file names '.*float' as its base"):
        model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The adapter belongs to integers")
        model.save_pretrained(tmp_path / "adapter")
        expected = logits(model, tokens())
        model.unload().save_pretrained(tmp_path / "base")
        again = PeftModel.from_pretrained(load_quantized(tmp_path / "base"), tmp_path / "adapter")
        assert torch.equal(logits(again, tokens()), expected)
        named = made()
        named.name_or_path = str(tmp_path / "base")
        get_peft_model(named, config).save_pretrained(tmp_path / "named")
        get_peft_model(load_quantized(tmp_path / "base"), config).save_pretrained(tmp_path / "loaded")
        get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "float"), config).save_pretrained(
            tmp_path / "plain"
        )


def test_a_base_that_transformers_made_floats_of_keeps_its_grid_or_says_so(method: ModuleType, tmp_path: Path):
    """As it does with zero points. Low-bit SR has none, so it names the base's grid in no way."""
    merged(bits=2, symmetric=False).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    start = logits(load_quantized(tmp_path), IDS)
    with pytest.raises(ValueError, match=r"quantized to 2 bits, asymmetric, groups of 8 .*load_quantized"):
        method.adapt(model, **GRID)
    assert torch.equal(logits(model, IDS), start)  # and nothing was converted
    if method is not lowbit_sr:
        known = method.adapt(AutoModelForCausalLM.from_pretrained(tmp_path), bits=2, group_size=8, symmetric=False)
        assert torch.equal(logits(known, IDS), start)
    del model.config.peft_lrqat
    method.adapt(model, **GRID)
