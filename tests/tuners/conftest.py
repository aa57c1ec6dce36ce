"""`method` runs a test with each of the two methods; a folder of one method's own tests sets it."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType

import pytest
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests import lowbit_sr, lrqat
from tests.models import tiny
from tests.trainer import counting_text, word_tokenizer


@pytest.fixture(scope="module", params=[lrqat, lowbit_sr], ids=["lrqat", "lowbit_sr"])
def method(request: pytest.FixtureRequest) -> ModuleType:
    """`tests/lrqat.py` or `tests/lowbit_sr.py`."""
    return request.param


@pytest.fixture(scope="module")
def grid_model(method: ModuleType) -> PreTrainedModel:
    return method.on_grid()


@pytest.fixture
def base(grid_model: PreTrainedModel) -> PreTrainedModel:
    """A model on the grid."""
    return copy.deepcopy(grid_model)


@pytest.fixture
def two_adapters(method: ModuleType, base: PreTrainedModel) -> PeftModel:
    return method.two_adapters(base)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint on disk, as users have one."""
    folder = tmp_path_factory.mktemp("base")
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(method: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter for `tiny()`."""
    folder = tmp_path_factory.mktemp("adapter")
    method.random_adapter(tiny()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="module")
def text() -> Dataset:
    return counting_text()
