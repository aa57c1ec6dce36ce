"""What is compressed-tensors' own: it is what `save_pretrained` of a merged model writes; several grids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peft_lrqat import export
from peft_lrqat.grid import Grid
from tests.files import read
from tests.grids import on_grid


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(2, 0, False), Grid(3, -1)], ids=Grid.describe)
def test_compressed_tensors_is_what_save_pretrained_writes(grid: Grid, tmp_path: Path):
    model = on_grid(grid, family="qwen2", container_bits=4)
    export(model, tmp_path / "exported", progress=False)
    model.save_pretrained(tmp_path / "saved")
    exported, saved = read(tmp_path / "exported"), read(tmp_path / "saved")
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "exported" / name).read_text()) == json.loads(
            (tmp_path / "saved" / name).read_text()
        )
