"""Every field of a configuration has a rule, and what passes can be written to a file and read back."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from tests.models import tiny

# Of neither method: PEFT checks them, or LR-QAT refuses whatever is in them, or they say nothing there.
_OTHERS = {
    "peft_type", "task_type", "bits", "group_size", "container_bits",  # checked with the grid
    "use_dora", "lora_bias", "layer_replication", "megatron_config", "target_parameters", "eva_config", "corda_config",
    "lora_ga_config", "velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "use_bdlora",
    "arrow_config", "kasa_config", "megatron_core", "qalora_group_size",
}  # fmt: skip

NAN, INF = math.nan, math.inf


def test_every_field_has_a_rule(method: ModuleType):
    config = method.config()
    names = {field.name for field in dataclasses.fields(config)}
    assert names - _OTHERS - config.rules.keys() == set()
    assert config.rules.keys() - names == set()


WRONG: dict[str, list[Any]] = {
    "target_modules": [3, "", "(", [], ["q_proj", 3], [""], {"q_proj": 1}, True, b"q_proj", [["q_proj"]]],
    "exclude_modules": [3, "", "(", [3], True],
    "layers_to_transform": ["0", [0.0], [-1], True, 1.0, [[0]]],
    "layers_pattern": [3, "", [3]],
    "modules_to_save": ["lm_head", [3], 3, [""]],
    "trainable_token_indices": [3, [1.0], {"embed_tokens": [True]}, {3: [1]}],
    "bits": ["4", 4.5, True, NAN, [4], None.__class__],
    "group_size": ["8", 8.0, True, -3, NAN, [8]],
    "container_bits": ["8", 8.0, True, NAN],
    "act_bits": ["8", 8.0, True],
    "range_method": [1, True, ["lp"]],
    "range_p": ["2.5", 0, -1, NAN, INF, True],
    "scale_dtype": ["float32", 16, True],
    "learn_scales": ["False", 1, 0, "no", 1.0],
    "bias": [True, 0, "some", ["all"]],
    "inference_mode": ["yes", 1],
    "base_model_name_or_path": [3, True],
    "base_fingerprint": [3],
    "auto_mapping": ["a"],
}
LRQAT: dict[str, list[Any]] = {
    "r": ["4", 4.0, True, -1, NAN, None, [4]],
    "lora_alpha": ["16", 0, -1, NAN, INF, True, [1]],
    "rank_pattern": [{"q_proj": 4.0}, {"q_proj": True}, {3: 4}, {"(": 4}, [("q_proj", 4)], "q_proj"],
    "alpha_pattern": [{"q_proj": INF}, {"q_proj": "1"}, {"q_proj": -1.0}],
    "use_rslora": ["False", 1, None],
    "lora_dropout": ["0", None, NAN, True, False],
    "init_lora_weights": [1, 0, "gaussian", None],
    "symmetric": ["False", 1, 0],
    "downcast": ["int8", 8, True],
    "fan_in_fan_out": ["no"],
    "offload_base": ["cpu", 1, None],
    "loftq_config": ["a", 3],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
}
LOWBIT: dict[str, list[Any]] = {
    "seed": ["1", 1.0, True, None, NAN],
    "keep_base": ["False", 0, None],
    "headroom": ["2", 0, 0.5, NAN, INF, True, None],
    "error_feedback": ["False", 0],
    "init_weights": ["False", 0, None],
    "forward_bits": [1.5, "1.58", True, 2],
    "export_format": ["gguf", True, ["bitnet"]],
}


def test_another_type_or_range_is_refused_by_name(method: ModuleType):
    for name, values in {**WRONG, **(LRQAT if method.NAME == "LR-QAT" else LOWBIT)}.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"`{name}(\[.*\])?` is .*\.$"):
                method.config(**{name: value})
        if name in ("inference_mode", "base_model_name_or_path", "auto_mapping"):  # which PEFT sets itself
            continue
        config = method.config()
        setattr(config, name, values[0])  # since it was made
        with pytest.raises(ValueError, match=f"`{name}"):
            get_peft_model(nn.ModuleList([nn.Linear(8, 8)]), config)


def test_numpys_values_and_the_like_become_pythons(method: ModuleType, tmp_path: Path):
    given = {
        "bits": np.int64(4),
        "group_size": np.int32(8),
        "container_bits": np.uint8(8),
        "range_p": np.float32(2.5),
        "learn_scales": np.bool_(True),
        "layers_to_transform": np.arange(2),
        "target_modules": ("q_proj", np.str_("v_proj")),
        "exclude_modules": frozenset(["o_proj"]),
        "trainable_token_indices": {"embed_tokens": {3, np.int64(1)}},
        "base_model_name_or_path": Path("some") / "model",
    }
    if method.NAME == "LR-QAT":
        given |= {"r": np.int16(2), "lora_alpha": np.float64(8), "rank_pattern": {np.str_("q_proj"): np.int64(3)}}
    else:
        given |= {"seed": np.int64(3), "keep_base": np.bool_(False)}
    config = method.config(**given)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    for name in given:
        value = getattr(config, name)
        assert type(value).__module__ == "builtins", name
        assert saved[name] == (sorted(value, key=saved[name].index) if isinstance(value, set) else value)
    assert saved["layers_to_transform"] == [0, 1]
    assert saved["trainable_token_indices"] == {"embed_tokens": [1, 3]}
    again = type(config).from_pretrained(tmp_path)
    assert {n: getattr(again, n) for n in given} == {n: getattr(config, n) for n in given}


def test_a_files_configuration_is_checked_and_named(method: ModuleType, folder: Path):
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    for change in ({"learn_scales": "False"}, {"range_p": NAN}, {"bits": "4"}):
        path.write_text(json.dumps({**saved, **change}))
        for load in (
            lambda: PeftModel.from_pretrained(tiny(), folder),
            lambda: type(method.config()).from_pretrained(folder),
        ):
            with pytest.raises(ValueError, match=rf"{path}' cannot be used: `{next(iter(change))}` is"):
                load()
        with pytest.raises(ValueError, match=f"`{next(iter(change))}` is"):
            PeftConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", ["lora_1", "lora", "lowbitsr", "my adapter", "2nd", "default_2"])
def test_names_that_files_can_tell_apart_come_back(method: ModuleType, name: str, tmp_path: Path):
    model = get_peft_model(tiny(), method.other(), adapter_name=name)
    model.add_adapter("second", method.other())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path / name, adapter_name=name)
    mine, theirs = (method.layers(m) for m in (model, again))
    assert mine
    for layer in mine:
        ours, found = (layers[layer].grid_tensor([name]) for layers in (mine, theirs))
        assert ours.codes.equal(found.codes)
        assert ours.scale.equal(found.scale)
