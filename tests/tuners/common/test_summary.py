"""What conversion says: how much of the model is on the grid, and a warning where most of it stayed float."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForSequenceClassification

from peft_lrqat.tuners.common.summary import summarize
from tests.models import adapted, tiny

# of tiny(): 2 layers; q and o 32 x 32, k and v 16 x 32, three of 48 x 32; embeddings and output 96 x 32; norms
LINEAR = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
TOTAL = LINEAR + 2 * 96 * 32 + 5 * 32


def test_the_default_is_said_and_counted(method: ModuleType, caplog: pytest.LogCaptureFixture):
    config = method.config(target_modules=None)
    with caplog.at_level(logging.INFO, "peft_lrqat"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Most of the model")
        model = get_peft_model(tiny(), config)
    (record,) = caplog.records
    share = f"{100 * LINEAR / TOTAL:.0f} %"
    assert (
        f"14 layers on the grid (4 bits, symmetric, groups of 8), {share} of the model's {TOTAL} weights"
        in record.message
    )
    assert "Float stay: embeddings and output layer (6144)." in record.message
    found = summarize(model.base_model.model, "")
    assert (found.layers, found.weights, found.total, found.tables) == (14, LINEAR, TOTAL, 2 * 96 * 32)
    assert not found.matrices
    assert found.bytes_before == 4 * LINEAR
    scales = 4 * LINEAR // 8
    assert f": {4 * LINEAR / 1e3:.1f} kB became {found.bytes_after / 1e3:.1f} kB." in record.message
    # 1 byte (fx8), or 4 bits for the base and for the adapter, which has scales of its own
    assert found.bytes_after == (LINEAR + scales if method.NAME == "LR-QAT" else 2 * (LINEAR // 2 + scales))


@pytest.mark.parametrize("options", [
    {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3, 4]},
])  # fmt: skip
def test_what_an_adapter_trains_in_float_counts_once(options: dict):
    found = summarize(adapted(tiny(), **options).base_model.model, "")
    assert (found.weights, found.total, found.tables, found.matrices) == (LINEAR, TOTAL, 2 * 96 * 32, {})


def test_a_head_is_called_by_its_name():
    model = LlamaForSequenceClassification(tiny().config)
    found = summarize(adapted(model, task_type="SEQ_CLS").base_model.model, "")
    assert found.matrices == {"score": 2 * 32}


def test_a_further_adapter_converts_nothing(method: ModuleType, caplog: pytest.LogCaptureFixture):
    targets = ["q_proj", "up_proj", "down_proj", "gate_proj"]
    model = get_peft_model(tiny(), method.config(target_modules=targets))
    caplog.clear()
    with caplog.at_level(logging.INFO, "peft_lrqat"):
        model.add_adapter("other", method.config(target_modules=["up_proj"]))
        assert not caplog.records
        merged = model.merge_and_unload()
    assert summarize(merged, "").layers == 8


def test_the_first_process_of_a_machine_speaks(method: ModuleType, caplog, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with caplog.at_level(logging.INFO, "peft_lrqat"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Most of the model")
        method.adapt(tiny(), **method.GRID)
        get_peft_model(tiny(), method.config(target_modules=method.ATTENTION))
    assert not caplog.records


def test_a_model_that_stays_float(method: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with (
        caplog.at_level(logging.INFO, "peft_lrqat"),
        pytest.warns(UserWarning, match=r"Most of the model stays float.*14 %.*gate_proj \(3072\).*'all-linear'"),
    ):
        model = get_peft_model(tiny(), method.config(target_modules=method.ATTENTION))
    assert not caplog.records  # the warning has it all
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Most of the model")
        PeftModel.from_pretrained(tiny(), tmp_path)  # it was trained so


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 16))


def test_experts_in_one_parameter_are_named(method: ModuleType):
    model = nn.ModuleDict({"experts": Experts(), "tied": nn.Linear(8, 8)})
    model["again"] = model["tied"]
    with pytest.warns(UserWarning, match=r"gate_up_proj \(512\).*experts of mixtures"):
        get_peft_model(model, method.config(target_modules=["router"]))
    assert summarize(model, "").matrices == {"gate_up_proj": 512, "tied": 64}


@pytest.mark.parametrize("set_up", [False, True])
def test_it_is_seen_where_nobody_set_up_logging(method: ModuleType, monkeypatch, capsys, set_up: bool):
    monkeypatch.setattr(logging.root, "handlers", [logging.NullHandler()] if set_up else [])
    method.adapt(tiny(), **method.GRID)
    assert ("14 layers on the grid" in capsys.readouterr().err) != set_up
