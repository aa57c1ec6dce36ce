"""PEFT asks before it injects, saves or loads an adapter, of whichever method, and does nothing if the answer is no."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from peft_lrqat.peft_hooks import (
    before_injection,
    before_loading,
    before_loading_a_file,
    before_saving,
    before_saving_a_model,
)
from tests.models import tiny


@pytest.fixture(autouse=True)
def _peft_as_it_was(monkeypatch):
    for owner, name in (
        (BaseTuner, "inject_adapter"),
        (BaseTuner, "_remap_adapter_state_dict_for_load"),
        (PeftModel, "save_pretrained"),
        (PeftModel, "load_adapter"),
        (PreTrainedModel, "save_pretrained"),
    ):
        monkeypatch.setattr(owner, name, vars(owner)[name])


class Refusal(Exception):
    """What the asked one raises."""


def _lora() -> PeftModel:
    return get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))


def test_nothing_is_injected():
    layer, asked = nn.Linear(4, 4), []

    def refuse(model: nn.Module) -> None:
        asked.append(model)
        raise Refusal

    before_injection(refuse)
    model = nn.Sequential(layer)
    with pytest.raises(Refusal):
        get_peft_model(model, LoraConfig(target_modules=["0"]))
    assert model[0] is layer
    assert asked == [model]


@pytest.mark.parametrize(("selected", "names"), [(None, ["default", "second"]), (["second"], ["second"])])
def test_nothing_is_written(selected: list[str] | None, names: list[str], tmp_path: Path):
    model = _lora()
    model.add_adapter("second", LoraConfig(target_modules=["0"]))
    asked = []

    def refuse(*given: Any) -> None:
        asked.append(given)
        raise Refusal

    before_saving(refuse)
    values = get_peft_model_state_dict(model)
    with pytest.raises(Refusal):
        model.save_pretrained(tmp_path / "adapter", selected_adapters=selected, state_dict=values)
    assert not (tmp_path / "adapter").exists()
    ((of, adapters, options),) = asked
    assert of is model
    assert adapters == names
    assert options["state_dict"] is values
    with pytest.raises(Refusal):
        model.save_pretrained(tmp_path / "adapter", True, selected, "auto", True, "where it began")
    assert asked[1][2]["path_initial_model_for_weight_conversion"] == "where it began"


def test_no_model_is_written(tmp_path: Path):
    asked = []

    def refuse(model: nn.Module, options: dict[str, Any]) -> None:
        asked.append(options)
        raise Refusal

    before_saving_a_model(refuse)
    with pytest.raises(Refusal):
        tiny(num_hidden_layers=1).save_pretrained(tmp_path / "model", True, {}, token=None)
    assert not (tmp_path / "model").exists()
    assert asked[0]["state_dict"] == {}
    assert asked[0]["save_directory"] == tmp_path / "model"


@pytest.mark.parametrize("before", [before_saving, before_saving_a_model])
def test_what_somebody_else_returns_or_raises_is_theirs(before: Any, monkeypatch):
    """Of packages that have wrapped the same methods, and of users who misspell a call."""
    model = _lora() if before is before_saving else tiny(num_hidden_layers=1)
    owner: Any = PeftModel if before is before_saving else PreTrainedModel
    own, asked = owner.save_pretrained, []
    with pytest.raises(TypeError) as without:
        model.save_pretrained()
    before(lambda *given: asked.append(given))
    with pytest.raises(TypeError) as error:
        model.save_pretrained()
    assert (str(error.value), asked) == (str(without.value), [])
    monkeypatch.setattr(owner, "save_pretrained", functools.wraps(own)(lambda *args, **kwargs: "written"))
    before(lambda *given: asked.append(given))
    assert model.save_pretrained("folder") == "written"
    assert len(asked) == 1


def test_no_file_is_opened(tmp_path: Path):
    model, asked = _lora(), []
    before = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}

    def refuse(*given: Any) -> None:
        asked.append(given)
        raise Refusal

    before_loading_a_file(refuse)
    for options in ({}, {"subfolder": "best"}):
        with pytest.raises(Refusal):
            model.load_adapter(tmp_path, "default", **options)
    assert asked == [(model, str(tmp_path), "default"), (model, str(tmp_path / "best"), "default")]
    assert all(tensor.equal(before[name]) for name, tensor in get_peft_model_state_dict(model).items())


def test_nothing_is_loaded():
    model = _lora()
    values = get_peft_model_state_dict(model)
    before = {name: tensor.clone() for name, tensor in values.items()}
    asked = []

    def refuse(config: Any, state_dict: dict[str, Any]) -> None:
        asked.append((config, state_dict.keys()))
        raise Refusal

    before_loading(refuse)
    with pytest.raises(Refusal):
        set_peft_model_state_dict(model, {name: tensor + 1 for name, tensor in values.items()})
    assert all(tensor.equal(before[name]) for name, tensor in get_peft_model_state_dict(model).items())
    assert len(asked) == 1
    assert asked[0][0] is model.peft_config["default"]


def test_a_second_call_asks_no_second_time(tmp_path: Path):
    asked = []
    kinds = {
        before_injection: "inject",
        before_saving: "save",
        before_loading: "load",
        before_loading_a_file: "open",
        before_saving_a_model: "save model",
    }
    for before, kind in kinds.items():
        ask = functools.partial(lambda kind, *_: asked.append(kind), kind)
        before(ask)
        before(ask)
    model = _lora()
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    tiny(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    assert asked == ["inject", "save", "inject", "open", "load", "save model"]
