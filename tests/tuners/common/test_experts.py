"""Which experts a configuration means; what it cannot quantize stays as it is, and is named or refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_lrqat import LowBitSRConfig, LRQATConfig
from peft_lrqat.modules.experts import Experts
from peft_lrqat.tuners.common.layer import MergingLayer
from tests.architectures import ARCHITECTURES
from tests.mixtures import FIRST, mixture, on_experts
from tests.models import logits, tokens

BOTH = {f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")}
ONE = {name for name in BOTH if ".0." in name}
FILES = ["gate_proj", "up_proj", "down_proj"]
PARAMETERS = ["experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = tokens(1, 4)
MODEL = mixture()


def converted(**options: Any) -> set[str]:
    """The experts' layers with adapters."""
    model = on_experts(copy.deepcopy(MODEL), init_lora_weights=True, r=1, **options).base_model.model
    found = {name for name, module in model.named_modules() if isinstance(module, MergingLayer)}
    assert not any(
        isinstance(module, Experts) for name, module in model.named_modules() if name + ".down_proj" not in found
    )
    return {name for name in found if "experts" in name}


@pytest.mark.filterwarnings("ignore:Most of the model")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, BOTH),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, ONE),
        ({"exclude_modules": ["experts"]}, set()),
        ({"exclude_modules": r".*layers\.1.*"}, ONE),
        ({"exclude_modules": ["up_proj"]}, set()),
        ({"target_modules": ["q_proj", *FILES]}, BOTH),
        ({"target_modules": ["q_proj", *FILES], "layers_to_transform": 0}, ONE),
        ({"target_modules": ["gate_up_proj", "down_proj"]}, BOTH),
        ({"target_modules": r".*\.1\..*_proj"}, BOTH - ONE),
        ({"target_modules": ["q_proj", "v_proj"]}, set()),
        ({"target_modules": [], "target_parameters": PARAMETERS}, BOTH),
        ({"target_modules": ["q_proj"], "target_parameters": PARAMETERS}, BOTH),
        ({"target_modules": r".*q_proj", "target_parameters": PARAMETERS}, BOTH),
        ({"target_parameters": PARAMETERS}, BOTH),
        ({"target_modules": ["q_proj"], "target_parameters": PARAMETERS, "layers_to_transform": [0]}, ONE),
        ({"target_modules": ["q_proj"], "target_parameters": PARAMETERS, "exclude_modules": ["experts"]}, set()),
        ({"target_modules": ["q_proj", "experts"]}, BOTH),
        ({"target_modules": ["layers.0.mlp.experts"]}, ONE),
        ({"target_modules": r".*experts.*"}, BOTH),
        ({"target_modules": r".*\.(q_proj|gate_proj|up_proj|down_proj)"}, BOTH),
        ({"target_modules": r".*\.experts\.\d+\..*|.*q_proj"}, BOTH),
        ({"exclude_modules": r".*\.experts\.\d+\..*"}, set()),
    ],
)
def test_experts_are_chosen(options: dict, expected: set[str]):
    assert converted(**options) == expected


@pytest.mark.filterwarnings("error:.*no module of this model is called so")
@pytest.mark.parametrize("targets", [["q_proj", *FILES], ["experts.gate_up_proj", "experts.down_proj"]])
def test_names_of_experts_are_known(targets: list[str]):
    assert converted(target_modules=targets) == BOTH


@pytest.mark.filterwarnings("ignore:Most of the model")
@pytest.mark.filterwarnings("error:.*no module of this model is called so")
@pytest.mark.parametrize(
    ("option", "options", "whole"),
    [
        ("target_modules", {"target_modules": ["q_proj", "down_proj"]}, "down_proj, gate_proj, up_proj"),
        (
            "target_parameters",
            {"target_modules": ["q_proj"], "target_parameters": PARAMETERS[:1]},
            "experts.down_proj, .*",
        ),
        ("exclude_modules", {"exclude_modules": ["down_proj"]}, "down_proj, gate_proj, up_proj"),
    ],
)
def test_a_part_of_the_experts_is_not_enough(option: str, options: dict, whole: str):
    said = rf"`{option}` names a part of the experts of 2 layers, e.g. '{FIRST}'.*\({whole}\)"
    with pytest.warns(UserWarning, match=said):
        assert not converted(**options)


def test_nor_to_convert_nothing_else():
    said = r"`target_parameters` names a part of the experts of 2 layers.*nothing else.*Name all of it \(experts.down_"
    with pytest.raises(ValueError, match=said):
        converted(target_modules=[], target_parameters=PARAMETERS[:1])


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_single_experts_are_refused(option: str):
    with pytest.raises(ValueError, match=rf"`{option}` names 1 of the 5 experts of '{FIRST}' \(up_proj\)"):
        converted(**{option: ["q_proj", "experts.3.up_proj"]})


def test_names_in_files_of_another_name():
    """Files of Mixtral call the module otherwise."""
    model = ARCHITECTURES["Mixtral"].build()
    config = LRQATConfig(r=1, group_size=8, range_method="minmax", exclude_modules=r".*block_sparse_moe\.experts\..*")
    with pytest.warns(UserWarning, match="Most of the model stays float"):
        get_peft_model(model, config)
    assert not any(isinstance(module, Experts) for module in model.modules())


def test_single_experts_of_a_merged_model_are_refused():
    model = on_experts(copy.deepcopy(MODEL)).merge_and_unload()
    before = logits(model, IDS)
    with (
        pytest.warns(UserWarning, match="`target_modules` names a part of the experts"),
        pytest.raises(ValueError, match=r"names 10 layers of single experts.*trained together"),
    ):
        get_peft_model(model, LRQATConfig(r=1, target_modules=r".*\.(q|down)_proj"))
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.filterwarnings("ignore:Most of the model")
def test_parts_that_other_layers_are_called_too_and_that_stay_float():
    """Nothing may be said of "gate_proj", which the shared experts are called, but of the experts."""
    model = ARCHITECTURES["DeepSeek-V3"].build()
    with pytest.warns(UserWarning, match=r"The experts of 'model.layers.1.mlp.experts' stay as they are"):
        get_peft_model(model, LowBitSRConfig(group_size=8, target_modules=FILES))


def test_what_the_model_says_afterwards(caplog: pytest.LogCaptureFixture):
    model = copy.deepcopy(MODEL)
    with warnings.catch_warnings(), caplog.at_level("INFO", "peft_lrqat"):
        warnings.filterwarnings("error", message="Most of the model|The experts")
        model = on_experts(model)
    assert "8 layers and 10 experts on the grid" in caplog.text
    assert "gate (320)" in caplog.text  # the routers
    assert model.peft_config["default"].target_parameters is None
    assert model.base_model.model.get_submodule(FIRST).parts["down_proj"] == ("down_proj",)


ASKED = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}


@pytest.mark.filterwarnings("ignore:Most of the model")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"group_size": 0}, "`group_size` is 0"),
        ({"init_lora_weights": "loftq"}, "`init_lora_weights` is 'loftq'"),
        ({"group_size": -1, "act_bits": 8}, "their inputs would be rounded"),
    ],
    ids=["tensor", "loftq", "activations"],
)
def test_what_cannot_be_done_with_experts(options: dict, reason: str):
    config = {"r": 1, "group_size": 8, "range_method": "minmax", **options}
    with pytest.warns(UserWarning, match=rf"The experts of 2 layers.*stay as they are: {reason}"):
        model = get_peft_model(copy.deepcopy(MODEL), LRQATConfig(**config, target_modules="all-linear"))
    assert not any(isinstance(module, Experts) for module in model.modules())
    plain = copy.deepcopy(MODEL)
    with pytest.raises(ValueError, match=rf"experts of '{FIRST}'.*cannot be quantized: {reason}"):
        get_peft_model(plain, LRQATConfig(**{**config, **ASKED}))
    assert torch.equal(logits(plain, IDS), logits(MODEL, IDS))


@pytest.mark.filterwarnings("ignore:Most of the model")
def test_low_bit_sr_leaves_experts_float():
    with pytest.warns(UserWarning, match=r"The experts of 2 layers.*LRQATConfig trains them"):
        get_peft_model(copy.deepcopy(MODEL), LowBitSRConfig(group_size=8))
    with pytest.raises(ValueError, match=r"cannot be quantized.*LRQATConfig trains them"):
        get_peft_model(copy.deepcopy(MODEL), LowBitSRConfig(group_size=8, target_modules=["experts.gate_up_proj"]))


@pytest.mark.filterwarnings("ignore:Most of the model")
def test_experts_that_files_hold_in_one_tensor():
    model = ARCHITECTURES["gpt-oss"].build()
    with pytest.warns(UserWarning, match="files of GptOssForCausalLM hold them as gate_up_proj, down_proj"):
        get_peft_model(copy.deepcopy(model), LRQATConfig(r=1, group_size=8, range_method="minmax"))
    with pytest.raises(ValueError, match=r"GptOssExperts.*cannot be quantized"):
        get_peft_model(model, LRQATConfig(r=1, group_size=8, **ASKED))


def test_parameters_that_are_no_experts():
    with pytest.raises(ValueError, match=r"`target_parameters` names 'gate.weight', which is no projection of experts"):
        converted(target_parameters=["gate.weight", *PARAMETERS])
    with pytest.raises(ValueError, match="`target_parameters` is 'experts'; it must be a list"):
        LRQATConfig(target_parameters="experts")


def test_an_error_leaves_the_model_as_it_was():
    model = copy.deepcopy(MODEL)
    model.lm_head.weight.data[0, 0] = torch.nan
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match="NaN"):
        on_experts(model, target_modules=["lm_head", *FILES])
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["experts"]},
        {"target_modules": r".*experts.*"},
        {"target_modules": r".*\.experts\.\d+\..*"},
        {"target_modules": [], "target_parameters": PARAMETERS},
    ],
    ids=["module", "pattern", "files", "parameters"],
)
def test_names_of_experts_that_have_an_adapter(options: dict):
    model = on_experts(copy.deepcopy(MODEL))
    model.add_adapter("second", LRQATConfig(r=1, group_size=8, range_method="minmax", **options))
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, MergingLayer)}
    assert {name for name, layer in layers.items() if "second" in layer.lora_A} == BOTH
    with pytest.raises(ValueError, match=r"`target_modules` names 1 of the 5 experts"):
        model.add_adapter("third", LRQATConfig(r=1, group_size=8, target_modules=["experts.0.up_proj"]))


def test_a_second_adapter_may_have_other_targets():
    model = on_experts(copy.deepcopy(MODEL))
    with_experts = logits(model, IDS)
    model.add_adapter("attention", LRQATConfig(r=1, group_size=8, range_method="minmax", target_modules=["q_proj"]))
    model.add_adapter("mixture", LRQATConfig(r=1, group_size=8, range_method="minmax", target_modules=FILES))
    for projection in ("gate_up_proj", "down_proj"):
        layer: nn.Module = model.base_model.model.get_submodule(f"{FIRST}.{projection}")
        assert set(layer.lora_A) == {"default", "mixture"}
    assert torch.equal(logits(model, IDS), with_experts)
    model.set_adapter("attention")
    assert torch.equal(logits(copy.deepcopy(model).merge_and_unload(), IDS), logits(model, IDS))
