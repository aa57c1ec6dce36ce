"""Which modules `target_modules` and its kin choose, and what is said of names that reach none."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_lrqat.tuners.common.targets import routers
from tests.architectures import ARCHITECTURES
from tests.models import logits, tiny, tokens, train
from tests.refusals import refused

ATTENTION = ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, 12),
        ({"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}, 8),
        ({"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"}, 2),
        ({"target_modules": ATTENTION, "layers_to_transform": [1]}, 2),
        ({"target_modules": ATTENTION, "layers_to_transform": 0, "layers_pattern": "layers"}, 2),
        ({"target_modules": None}, 14),
        ({"target_modules": "All-Linear", "layers_to_transform": [1]}, 7),
        ({"target_modules": None, "layers_to_transform": 0, "exclude_modules": ["q_proj"]}, 6),
        ({"target_modules": ["lm_head"]}, 1),
    ],
)
def test_modules_are_chosen_as_in_lora(method: ModuleType, options: dict, expected: int):
    found = method.layers(method.adapt(tiny(), **method.GRID, **options))
    assert len(found) == expected
    assert any("lm_head" in name for name in found) == (options["target_modules"] == ["lm_head"])


def test_a_name_that_no_module_has_is_said(method: ModuleType):
    with pytest.warns(UserWarning, match="`target_modules` names 'v_porj', but no module"):
        method.adapt(tiny(), **method.GRID, target_modules=["q_proj", "v_porj"])


@pytest.mark.parametrize(
    ("wanted", "listed"), [("q_proj", r"\['q_proj'\]"), ("q_proj, v_proj", r"\['q_proj', 'v_proj'\]")]
)
def test_a_string_is_no_name(method: ModuleType, wanted: str, listed: str):
    model, config = tiny(), method.config(target_modules=wanted)
    with refused(
        model, rf"^`target_modules` is '{wanted}'\. A string is a regular expression .* a list: {listed}", config=config
    ):
        get_peft_model(model, config)


def test_what_one_adapter_trains_in_float_is_no_layer_for_the_next(method: ModuleType, tmp_path: Path):
    """For PEFT, 'all-linear' means the copies of `modules_to_save`, too."""
    model = method.adapt(tiny(), **method.GRID, modules_to_save=["lm_head"])
    model.add_adapter("next", method.config(modules_to_save=["norm"]))
    assert len(method.layers(model)) == 14
    expected = {}
    for name in ("default", "next"):
        model.set_adapter(name)
        train(model, tokens())
        expected[name] = logits(model, tokens())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    again.load_adapter(tmp_path / "next", "next")
    for name, value in expected.items():
        for one in (model, again):
            one.set_adapter(name)
            assert torch.equal(logits(one, tokens()), value)


@pytest.mark.parametrize(
    ("name", "chosen_by"),
    [
        ("HunYuan MoE", {"model.layers.0.mlp.gate.wg"}),
        ("Qwen 2 MoE", {"model.layers.0.mlp.shared_expert_gate"}),
        ("DeepSeek-V3", set()),  # no linear layers
        ("Llama", set()),
    ],
)
def test_what_chooses_experts_stays_float(method: ModuleType, name: str, chosen_by: set[str]):
    model = ARCHITECTURES[name].build()
    assert routers(model) == chosen_by
    if name == "Qwen 2 MoE":
        found = method.layers(method.adapt(model, **method.GRID, target_modules="all-linear"))
        names = {path.rpartition("base_model.model.")[2] for path in found}
        assert not names & chosen_by
        assert "model.layers.0.mlp.shared_expert.gate_proj" in names
        model = ARCHITECTURES[name].build()
        named = method.layers(method.adapt(model, **method.GRID, target_modules=["shared_expert_gate"]))
        assert len(named) == 1  # as asked
