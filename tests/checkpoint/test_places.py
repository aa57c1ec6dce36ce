"""An export never replaces what it reads, or what that needs, however the folder is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peft_lrqat import export
from peft_lrqat.checkpoint import places
from peft_lrqat.checkpoint.open import open_source
from peft_lrqat.checkpoint.places import check_apart
from peft_lrqat.grid import Grid
from tests.grids import on_grid
from tests.models import adapted, tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """run/base, run/base/adapter (of that base), run/merged."""
    run = tmp_path_factory.mktemp("places") / "run"
    base = tiny("qwen2", num_hidden_layers=1)
    base.save_pretrained(run / "base")
    base.name_or_path = str(run / "base")
    adapted(base, group_size=8, range_method="minmax").save_pretrained(run / "base" / "adapter")
    on_grid(Grid(4, 32)).save_pretrained(run / "merged")
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch) -> Path:
    """The same, reached through a link; the working directory is beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(made)
    return tmp_path / "run"


@pytest.mark.parametrize(("source", "out"), [
    ("run/merged", "run/merged"),
    ("run/merged", "run"),
    ("run/merged", "run/merged/new"),
    ("run/merged", "run/base/../merged/./a/b"),
    ("run/base/adapter", "run/base/adapter"),
    ("run/base/adapter", "run/base"),
    ("run/base/adapter", "run/base/new"),
    ("run/base/adapter", "run"),
])  # fmt: skip
@pytest.mark.parametrize("through", ["relative", "absolute", "real"])
def test_neither_the_source_nor_its_base_is_in_the_way(source: str, out: str, through: str, run: Path):
    write = {"relative": Path, "absolute": Path.absolute, "real": os.path.realpath}[through]
    before = sorted(run.rglob("*"))
    with pytest.raises(FileExistsError, match="lost"):
        export(source, write(Path(out)), overwrite=True, progress=False)
    assert sorted(run.rglob("*")) == before


def test_a_folder_beside_them_is_free(run: Path):
    check_apart(Path("run/other"), "run/merged")
    check_apart(Path("run/base2"), "run/base/adapter")
    check_apart(Path("run/merged/new"), on_grid(Grid(4, 32)))


def test_a_source_that_is_open_is_known(run: Path):
    with pytest.raises(FileExistsError, match="lost"):
        check_apart(Path("run/merged/new"), open_source(run / "merged"))


def test_files_that_are_links_lead_to_what_is_needed(run: Path, tmp_path: Path):
    """As in the Hub's cache, whose snapshots are links to blobs."""
    (tmp_path / "snapshot").mkdir()
    for file in (run / "merged").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    with pytest.raises(FileExistsError, match="has in it what is exported, or what that needs"):
        check_apart(run / "merged", tmp_path / "snapshot")


def test_what_a_model_in_memory_was_loaded_from_and_tokenizers_are_not_lost(run: Path, tmp_path: Path, monkeypatch):
    model = on_grid(Grid(4, 32))
    model.name_or_path = str(run / "base")
    for out in ("run", "run/base"):
        with pytest.raises(FileExistsError, match="would be lost"):
            check_apart(Path(out), model)
    (tmp_path / "words").mkdir()
    with pytest.raises(FileExistsError, match="would be lost"):
        check_apart(tmp_path / "words", "run/merged", "words")
    monkeypatch.setattr(places.constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    (tmp_path / "cache" / "hub").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="would be lost"):
        check_apart(tmp_path / "cache", "run/merged")
