"""The modules that are found before anything is changed are those that are converted."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from transformers import AutoModelForCausalLM

from tests.models import tiny

CHOICES: dict[str, dict[str, Any]] = {
    "all": {},
    "without a layer": {"exclude_modules": ["down_proj"]},
    "by name": {"target_modules": ["q_proj", "up_proj"]},
    "by expression": {"target_modules": r".*\.1\.mlp\.(c_fc|up_proj)"},
    "a block": {"layers_to_transform": [1]},
}


def finder(config: Any) -> Any:
    return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_found_is_what_is_converted(method: ModuleType, family: str, choice: str):
    options = CHOICES[choice]
    if family == "gpt2":
        names = {"down_proj": "c_proj", "q_proj": "c_attn", "up_proj": "c_fc"}
        options = {
            key: [names[name] for name in value] if key.endswith("_modules") and isinstance(value, list) else value
            for key, value in options.items()
        }
    config, model = method.config(task_type="CAUSAL_LM", **options), tiny(family)
    modules, before = dict(model.named_modules()), {name: p.clone() for name, p in model.named_parameters()}
    found = finder(config).find_targets(model, config)
    with torch.device("meta"):  # as transformers has it before it loads the weights
        to_load = finder(config).find_targets_to_load(AutoModelForCausalLM.from_config(model.config), config)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(modules[name] is module for name, module in found.items())

    converted = method.layers(get_peft_model(model, config).base_model.model)
    assert found.keys() == to_load.keys() == converted.keys()
    assert 0 < len(found) <= 14


def test_a_configuration_that_names_nothing_is_refused(method: ModuleType):
    for options, model, says in (
        ({}, nn.Sequential(nn.ReLU()), "the model has no nn.Linear or Conv1D"),
        ({"layers_to_transform": [7]}, tiny(), "no linear layer of the model is in such a layer"),
    ):
        config = method.config(**options)
        with pytest.raises(ValueError, match=says):
            finder(config).find_targets(model, config)
