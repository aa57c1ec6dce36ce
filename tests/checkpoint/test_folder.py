"""A checkpoint on disk as a source; what it refuses is in tests/formats/test_reading.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_lrqat.checkpoint.open import open_source
from tests.models import tiny
from tests.trained import trained


def test_the_grid_is_recorded_in_a_wider_container(tmp_path: Path):
    merged = trained("asymmetric").merge_and_unload()
    merged.save_pretrained(tmp_path)
    grids = open_source(tmp_path).grids().values()
    assert {(g.grid.bits, g.grid.symmetric, g.container_bits) for g in grids} == {(3, False, 4)}
    described = json.loads((tmp_path / "config.json").read_text())
    del described["peft_lrqat"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert {g.grid.bits for g in open_source(tmp_path).grids().values()} == {4}


def test_float_checkpoints(tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="float"):
        open_source(tmp_path)


def test_codes_outside_of_the_recorded_grid(tmp_path):
    trained("int8").merge_and_unload().save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["peft_lrqat"]["bits"] = 2
    (tmp_path / "config.json").write_text(json.dumps(described))
    source = open_source(tmp_path)
    with pytest.raises(ValueError, match="outside of the grid"):
        [source.layer(name) for name in source.grids()]


def test_truncated_files(tmp_path):
    trained("ternary").merge_and_unload().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        open_source(tmp_path)
