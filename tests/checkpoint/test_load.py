"""LR-QAT from a checkpoint that another tool quantized: equal at step 0, trained, merged back onto the same grid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

from peft_lrqat import Grid, LRQATConfig, export, load_quantized
from peft_lrqat.checkpoint.inspect import inspect
from peft_lrqat.modules.packed import QuantizedLinear
from peft_lrqat.packing import pack, unpack
from tests.architectures import ARCHITECTURES
from tests.models import logits, tiny, tokens, train
from tests.quantized_files import Spec, adapt, quantization_config, write

IDS = tokens()
SPECS = [
    *(Spec("packed", bits, group_size=16) for bits in (2, 3, 4, 8)),
    *(Spec("packed", bits, group_size=-1, symmetric=False) for bits in (2, 3, 4, 8)),
    Spec("packed", 4, group_size=0),
    Spec("packed", 5, group_size=-1, dtype=torch.bfloat16),
    Spec("packed", 4, group_size=32, symmetric=False, dtype=torch.float32),
    Spec("integers", 8, group_size=-1),
    Spec("integers", 8, group_size=-1, symmetric=False),
    Spec("integers", 8, group_size=32),
    Spec("integers", 8, group_size=0, dtype=torch.bfloat16),
    *(Spec("gptq", bits, group_size=32) for bits in (2, 3, 4, 8)),
    *(Spec("gptq", bits, group_size=32, symmetric=False) for bits in (2, 4)),
    *(Spec("gptq_v2", bits, group_size=-1, symmetric=False) for bits in (2, 3, 4, 8)),
    Spec("gptq_v2", 4, group_size=16),
    Spec("awq", 4, group_size=32),
    Spec("awq", 4, group_size=16, symmetric=False),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_codes_of_the_file_are_the_base_and_the_adapter_trains_on_them(spec: Spec, tmp_path: Path):
    float_model = write(tmp_path / "base", spec)
    expected = logits(float_model, IDS)
    model = load_quantized(tmp_path / "base")
    assert model.dtype == spec.dtype
    assert torch.equal(logits(model, IDS), expected)

    adapted = adapt(model)
    config = adapted.peft_config["default"]
    symmetric = spec.symmetric and spec.method != "awq"  # whose files always hold zero points
    assert (config.bits, config.group_size, config.symmetric) == (spec.bits, spec.group_size, symmetric)
    assert config.downcast == "int"
    assert torch.equal(logits(adapted, IDS), expected)

    losses = train(adapted, IDS)
    assert losses[-1] < losses[0]
    trained = logits(adapted, IDS)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_quantized(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again, IDS), trained)

    merged = adapted.merge_and_unload()
    assert torch.equal(logits(merged, IDS), trained)
    grids = {m.grid for m in merged.modules() if isinstance(m, QuantizedLinear)}
    assert grids == {Grid(spec.bits, spec.group_size, config.symmetric)}
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_quantized(tmp_path / "merged"), IDS), trained)


@pytest.mark.parametrize("method", ["gptq", "gptq_v2"])
def test_gptq_in_gptq_out(method: str, tmp_path: Path):
    spec = Spec(method, 4, group_size=32)
    write(tmp_path / "base", spec)
    adapted = adapt(load_quantized(tmp_path / "base"))
    train(adapted, IDS)
    trained = logits(adapted, IDS)
    export(adapted, tmp_path / "out", format="gptq", checkpoint_format=method)
    assert torch.equal(logits(load_quantized(tmp_path / "out"), IDS), trained)


@pytest.mark.parametrize("downcast", ["fx8", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_downcast_holds_the_codes(downcast: str, symmetric: bool, tmp_path: Path):
    expected = logits(write(tmp_path, Spec("gptq_v2", 3, 32, symmetric)), IDS)
    assert torch.equal(logits(adapt(load_quantized(tmp_path), downcast=downcast), IDS), expected)


def test_a_merged_model_goes_on_training_in_memory_and_keeps_its_grid_in_a_wider_container(tmp_path: Path):
    write(tmp_path, Spec("packed", 3, 0))
    first = adapt(load_quantized(tmp_path), container_bits=4)
    train(first, IDS)
    merged = first.merge_and_unload()
    before = logits(merged, IDS)
    second = adapt(merged)
    config = second.peft_config["default"]
    assert (config.bits, config.group_size, config.container_bits) == (3, 0, 4)
    assert torch.equal(logits(second, IDS), before)
    train(second, IDS)
    trained = logits(second, IDS)
    second.merge_and_unload().save_pretrained(tmp_path / "out")
    again = load_quantized(tmp_path / "out")
    assert torch.equal(logits(again, IDS), trained)
    layer = again.model.layers[0].mlp.up_proj
    assert (layer.grid, layer.bits) == (Grid(3, 0), 4)


def test_a_narrower_grid_in_a_wider_file_that_does_not_say_so(tmp_path: Path):
    write(tmp_path / "base", Spec("packed", 3, 16))
    export(load_quantized(tmp_path / "base"), tmp_path / "wide", container_bits=4)
    described = json.loads((tmp_path / "wide" / "config.json").read_text())
    del described["peft_lrqat"]
    (tmp_path / "wide" / "config.json").write_text(json.dumps(described))
    expected = logits(load_quantized(tmp_path / "base"), IDS)
    for options, bits in (({}, 4), ({"bits": 3}, 3)):
        adapted = adapt(load_quantized(tmp_path / "wide"), **options)
        assert torch.equal(logits(adapted, IDS), expected)
        merged = adapted.merge_and_unload().model.layers[0].mlp.up_proj
        assert (merged.grid.bits, merged.bits) == (bits, 4)
    with pytest.raises(ValueError, match="asks for bits=2"):
        adapt(load_quantized(tmp_path / "wide"), bits=2)


@pytest.mark.parametrize("method", ["packed", "gptq"])
def test_an_adapters_folder_is_exported_on_its_quantized_base(method: str, tmp_path: Path):
    write(tmp_path / "base", Spec(method, 4, 32))
    adapted = adapt(load_quantized(tmp_path / "base"))
    train(adapted, IDS)
    trained = logits(adapted, IDS)
    adapted.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out")
    assert torch.equal(logits(load_quantized(tmp_path / "out"), IDS), trained)


def test_scales_that_bf16_does_not_hold_are_kept(tmp_path: Path):
    spec = Spec("gptq", 4, 32, dtype=torch.bfloat16, scale_dtype=torch.float16)
    float_model = write(tmp_path, spec)
    with pytest.warns(UserWarning, match="float16 numbers that torch.bfloat16 does not hold"):
        model = load_quantized(tmp_path)
    assert torch.equal(logits(model, IDS), logits(float_model, IDS))
    with pytest.warns(UserWarning, match=r"before merging, call `model.float\(\)`"):
        adapted = adapt(model)
    assert adapted.peft_config["default"].scale_dtype == "fp16"
    assert torch.equal(logits(adapted, IDS), logits(float_model, IDS))
    train(adapted, IDS)
    with pytest.raises(ValueError, match=r"Call `model.float\(\)` before merging"):
        adapted.merge_and_unload()
    adapted.float()
    trained = logits(adapted, IDS)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), IDS), trained)


def test_rounding_the_scales_is_possible_and_said(tmp_path: Path):
    write(tmp_path, Spec("gptq", 4, 32))
    with pytest.warns(UserWarning, match=r"rounded, by up to 0.00\d of their size"):
        adapted = adapt(load_quantized(tmp_path), scale_dtype="auto")
    train(adapted, IDS)
    trained = logits(adapted, IDS)
    assert torch.equal(logits(adapted.merge_and_unload(), IDS), trained)


def test_layers_that_are_not_targeted_stay_quantized(tmp_path: Path):
    expected = logits(write(tmp_path / "base", Spec("awq", 4, 32, symmetric=False)), IDS)
    adapted = adapt(load_quantized(tmp_path / "base"), target_modules=["q_proj", "down_proj"])
    assert torch.equal(logits(adapted, IDS), expected)
    train(adapted, IDS)
    trained = logits(adapted, IDS)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(load_quantized(tmp_path / "out"), IDS), trained)


MIXED = {
    "config_groups": {
        "group_0": quantization_config(Spec("packed", 4, 32))["config_groups"]["group_0"],
        "group_1": quantization_config(Spec("packed", 8, -1))["config_groups"]["group_0"],
    }
}
MIXED["config_groups"]["group_0"]["targets"] = ["re:.*self_attn"]


def test_of_several_grids_one_is_trained_and_the_others_are_kept(tmp_path: Path):
    float_model = write(tmp_path / "base", Spec("packed", 8, -1), {"self_attn": Spec("packed", 4, 32)}, **MIXED)
    expected = logits(float_model, IDS)
    with pytest.raises(ValueError, match=r"2 different grids \(4 bits.*self_attn.*8 bits.*mlp.*target_modules"):
        adapt(load_quantized(tmp_path / "base"))
    adapted = adapt(load_quantized(tmp_path / "base"), target_modules=["up_proj", "down_proj"])
    assert torch.equal(logits(adapted, IDS), expected)
    train(adapted, IDS)
    trained = logits(adapted, IDS)
    adapted.merge_and_unload().save_pretrained(tmp_path / "out")
    for load in (load_quantized, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(load(tmp_path / "out"), IDS), trained)


def test_several_grids_that_transformers_does_not_load_are_said_when_they_are_merged(tmp_path: Path):
    groups = {
        "group_0": quantization_config(Spec("packed", 4, 32, False))["config_groups"]["group_0"],
        "group_1": quantization_config(Spec("packed", 8, -1))["config_groups"]["group_0"],
    }
    groups["group_0"]["targets"] = ["re:.*self_attn"]
    other = {"self_attn": Spec("packed", 4, 32, False)}
    float_model = write(tmp_path, Spec("packed", 8, -1), other, config_groups=groups)
    with pytest.warns(UserWarning, match=r"knows one grid for all layers. What works: `peft_lrqat.load_quantized`\."):
        model = load_quantized(tmp_path)
    assert torch.equal(logits(model, IDS), logits(float_model, IDS))
    transformers = inspect(tmp_path).engines[0]
    assert not transformers.loads
    assert "knows one grid" in transformers.why


def test_a_second_adapter_takes_the_grid_as_well(tmp_path: Path):
    expected = logits(write(tmp_path, Spec("gptq_v2", 3, 32, symmetric=False)), IDS)
    adapted = adapt(load_quantized(tmp_path))
    train(adapted, IDS)
    adapted.add_adapter("other", LRQATConfig(r=2, target_modules="all-linear"))
    adapted.set_adapter("other")
    assert torch.equal(logits(adapted, IDS), expected)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, IDS), expected)


def test_a_group_of_zeros_whose_scale_is_zero(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    float_model = write(tmp_path, Spec("packed", 4, 16))
    name = "model.layers.0.mlp.up_proj"
    state = load_file(tmp_path / "model.safetensors")
    state[name + ".weight_scale"][3, 1] = 0
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="scales of zero whose codes are not zero"):  # a damaged file
        load_quantized(tmp_path)
    codes = unpack(state[name + ".weight_packed"], 4, 64)
    codes[3, 16:32] = 0
    state[name + ".weight_packed"] = pack(codes, 4)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    float_model.get_submodule(name).weight.data[3, 16:32] = 0
    assert torch.equal(logits(adapt(load_quantized(tmp_path)), IDS), logits(float_model, IDS))


def test_options_left_open_are_those_of_each_base(tmp_path: Path):
    write(tmp_path, Spec("gptq_v2", 3, 32, symmetric=False))
    options = LRQATConfig(r=4, target_modules="all-linear")
    for model, expected in (
        (load_quantized(tmp_path), (3, 32, False, "fp16", "int")),
        (tiny(hidden_size=128, intermediate_size=256, num_hidden_layers=1), (4, 128, True, "auto", "fx8")),
    ):
        found = get_peft_model(model, options).peft_config["default"]
        assert (found.bits, found.group_size, found.symmetric, found.scale_dtype, found.downcast) == expected


def test_layers_that_an_architecture_keeps_in_fp32(tmp_path: Path):
    row = ARCHITECTURES["T5"]
    row.build().save_pretrained(tmp_path / "float")
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "float", dtype=torch.float16).eval()
    options = {"bits": 4, "group_size": -1, "range_method": "minmax"}
    merged = get_peft_model(model, LRQATConfig(**options, target_modules="all-linear")).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = load_quantized(tmp_path / "merged").eval()
    layer = loaded.encoder.block[0].layer[1].DenseReluDense
    assert (layer.wo.compute_dtype, layer.wi.compute_dtype) == (torch.float32, torch.float16)
    with torch.no_grad():
        batch = row.inputs()
        assert torch.equal(loaded(**batch).logits, merged(**batch).logits)


def test_what_is_no_place_no_class_and_no_flag():
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` is 5; it must be a folder, or the name"):
        load_quantized(5)
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` is Sequential") as found:
        load_quantized(torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(99)]))
    assert len(str(found.value)) < 300  # a model's representation has a line a layer
    with pytest.raises(ValueError, match="`model_class` is 'causal'; it must be a model's class"):
        load_quantized("name", model_class="causal")
    with pytest.raises(ValueError, match="`trust_remote_code` is 'no'; allowed are True, False"):
        load_quantized("name", trust_remote_code="no")
