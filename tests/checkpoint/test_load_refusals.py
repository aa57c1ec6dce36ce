"""Quantized checkpoints that training cannot start from: refused by name, with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_lrqat import LowBitSRConfig, LRQATConfig, load_quantized
from tests.models import tiny
from tests.quantized_files import SIZES, Spec, adapt, quantization_config, write

LAYER = "model.layers.0.mlp.up_proj"
_CT = quantization_config(Spec("packed"))["config_groups"]["group_0"]
_OTHER_RULE = {"peft_lrqat_rule": 3}
_A8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_STATIC = {**_A8, "dynamic": False, "strategy": "tensor"}


@pytest.mark.parametrize(
    ("spec", "config", "match"),
    [
        (Spec("packed"), {"quant_method": "hqq"}, "with 'hqq'; compressed-tensors, gptq, awq, bitnet"),
        (Spec("packed"), {"quant_method": "bitnet", "linear_class": "bitlinear"}, "holds a rounded inverse"),
        (Spec("packed"), {"kv_cache_scheme": {"num_bits": 8}}, "a quantized key-value cache"),
        (Spec("packed"), {"transform_config": {"config_groups": {}}}, r"transforms \(rotations\)"),
        *(
            (Spec("packed"), {"config_groups": {"group_0": {**_CT, **said}}}, "activations as well as")
            for said in (
                {"input_activations": {**_A8, "num_bits": 6}},
                {"input_activations": {**_A8, "symmetric": False}},
                {"input_activations": _A8, "output_activations": _A8},
                {"input_activations": _A8, "weights": {**_CT["weights"], "symmetric": False}},
            )
        ),
        (
            Spec("packed"),
            {"config_groups": {"group_0": {**_CT, "input_activations": _STATIC}}},
            "has no `input_scale`",
        ),
        (
            Spec("packed"),
            {"config_groups": {"group_0": {**_CT, "input_activations": {**_A8, "observer_kwargs": _OTHER_RULE}}}},
            "`rule` is 3",
        ),
        (Spec("packed"), {"format": "nvfp4-pack-quantized"}, "has format 'nvfp4-pack-quantized'"),
        (Spec("packed"), {"config_groups": {"group_0": {**_CT, "targets": ["re:.*q_proj"]}}}, "no entry of"),
        (Spec("gptq"), {"checkpoint_format": "marlin"}, "'marlin', made for one kernel"),
        (Spec("gptq"), {"bits": 8}, "cannot be read"),
        (Spec("gptq"), {"group_size": 16}, r"scales of shape \(.*, 2\); 4 bits, symmetric, groups of 16 needs"),
        (Spec("awq"), {"version": "gemv"}, "version 'gemv'"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_says_what_cannot_be_read(spec: Spec, config: dict, match: str, tmp_path: Path):
    write(tmp_path, spec, **config)
    with pytest.raises(ValueError, match=match):
        load_quantized(tmp_path)


def _act_order(state: dict) -> None:
    state[LAYER + ".g_idx"] = state[LAYER + ".g_idx"].flip(0).contiguous()


def _all_ones(state: dict) -> None:
    state[LAYER + ".qzeros"].fill_(-1)


def _without_zeros(state: dict) -> None:
    del state[LAYER + ".qzeros"]


def _elsewhere(state: dict) -> None:
    state["model.layers.0.mlp.experts.0.w1.qweight"] = state[LAYER + ".qweight"].clone()


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (_act_order, "by activation order"),
        (_all_ones, "stored as 15, which format v1 reads as 16 or 0"),
        (_without_zeros, "cannot be read from.*'qzeros'"),
        (_elsewhere, r"1 modules that are no nn.Linear.*experts.0.w1"),
    ],
)
def test_tensors_that_cannot_be_read(damage: Callable[[dict], None], match: str, tmp_path: Path):
    write(tmp_path, Spec("gptq"))
    state = load_file(tmp_path / "model.safetensors")
    damage(state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=match):
        load_quantized(tmp_path)


def test_a_float_checkpoint_and_a_configuration_of_the_caller(tmp_path: Path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no `quantization_config`: it is a float model"):
        load_quantized(tmp_path)
    with pytest.raises(ValueError, match="`quantization_config` is not for `load_quantized`"):
        load_quantized(tmp_path, quantization_config={})


def test_folders_without_a_checkpoint(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no config\.json, so it is no checkpoint"):
        load_quantized(tmp_path)
    (tmp_path / "model-Q4_0.gguf").write_bytes(b"GGUF")
    for place in (tmp_path, tmp_path / "model-Q4_0.gguf"):
        with pytest.raises(ValueError, match=r"is GGUF, which `load_quantized` does not read\. Give the checkpoint"):
            load_quantized(place)


def test_a_folder_that_is_not_there(tmp_path: Path):
    for place in (tmp_path / "none", str(tmp_path / "none"), "./none"):
        with pytest.raises(FileNotFoundError, match=r"^There is no folder '.*none'; a repository of the Hub is called"):
            load_quantized(place)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 3}, "asks for bits=3, but the base model is quantized with bits=4"),
        ({"bits": 4, "group_size": 16}, "asks for group_size=16, but .* group_size=32"),
        ({"symmetric": False}, "asks for symmetric=False, but .* symmetric=True"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"1 of .* are float.*exclude_modules=\['lm_head'\]"),
        ({"init_lora_weights": "loftq"}, "needs the float weight"),
    ],
)  # fmt: skip
def test_a_configuration_that_contradicts_the_base(options: dict, match: str, tmp_path: Path):
    write(tmp_path, Spec("gptq"))
    with pytest.raises(ValueError, match=match):
        adapt(load_quantized(tmp_path), **options)


def test_a_model_of_gptqmodel_is_told_the_way():
    model = tiny(**SIZES)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match=r"already quantized \(gptq\).*peft_lrqat.load_quantized"):
        adapt(model)


def test_low_bit_sr_asks_for_the_grid_of_the_base(tmp_path: Path):
    write(tmp_path, Spec("gptq"))
    with pytest.raises(ValueError, match=r"asks for bits=8.*quantized with bits=4.* Ask for the grid of the base;"):
        get_peft_model(load_quantized(tmp_path), LowBitSRConfig(target_modules="all-linear"))


def test_adapters_of_quantized_and_float_bases_are_told_apart(tmp_path: Path):
    float_model = write(tmp_path / "base", Spec("packed", 4, 32, dtype=torch.float32))
    adapt(load_quantized(tmp_path / "base")).save_pretrained(tmp_path / "quantized")
    options = {"bits": 4, "group_size": 32, "downcast": "int", "scale_dtype": "fp16"}
    get_peft_model(
        float_model, LRQATConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options)
    ).save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=r"its integers had .* have float weights .*peft_lrqat.load_quantized"):
        PeftModel.from_pretrained(tiny(**SIZES), tmp_path / "quantized")
    with pytest.raises(ValueError, match=r"its float weights had .* have integers"):
        PeftModel.from_pretrained(load_quantized(tmp_path / "base"), tmp_path / "float")


def test_an_adapter_is_no_checkpoint(tmp_path: Path):
    get_peft_model(tiny(), LRQATConfig(r=4, group_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds an adapter, and no checkpoint.*PeftModel.from_pretrained"):
        load_quantized(tmp_path)
