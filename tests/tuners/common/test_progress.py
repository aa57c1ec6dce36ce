"""A conversion that takes long shows how far it is."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from peft import PeftModel, get_peft_model
from transformers.utils import logging

from peft_lrqat.tuners.common import progress
from tests.models import tiny


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.fixture
def switch():
    shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()


@pytest.mark.usefixtures("at_once", "switch")
def test_layers_are_counted(method: ModuleType, capsys: pytest.CaptureFixture, tmp_path: Path):
    model = get_peft_model(tiny(), method.config())
    shown, said = capsys.readouterr().err, f"{method.config().method}: converting"
    assert f"{said}: 100%" in shown
    assert "14/14" in shown
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny(), tmp_path)
    assert "14/14" in capsys.readouterr().err


@pytest.mark.usefixtures("at_once", "switch")
def test_a_second_adapter_converts_nothing(method: ModuleType, capsys: pytest.CaptureFixture):
    model = get_peft_model(tiny(), method.config())
    capsys.readouterr()
    model.add_adapter("other", method.config())
    assert "converting" not in capsys.readouterr().err


@pytest.mark.usefixtures("at_once", "switch")
def test_transformers_switch_is_followed(method: ModuleType, capsys: pytest.CaptureFixture):
    logging.disable_progress_bar()
    get_peft_model(tiny(), method.config())
    assert "converting" not in capsys.readouterr().err


@pytest.mark.usefixtures("at_once", "switch")
def test_one_process_of_a_machine_shows_it(
    method: ModuleType, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOCAL_RANK", "1")
    get_peft_model(tiny(), method.config())
    assert "converting" not in capsys.readouterr().err


@pytest.mark.usefixtures("switch")
def test_quick_conversions_show_nothing(
    method: ModuleType, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress, "DELAY", 3600.0)
    get_peft_model(tiny(), method.config())
    assert "converting" not in capsys.readouterr().err
