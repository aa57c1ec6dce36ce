"""What `inspect` says of a folder: of our own, of a foreign one, of several grids."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_lrqat.checkpoint.inspect import inspect
from peft_lrqat.grid import Grid
from tests.grids import on_grid
from tests.quantized_files import Spec, write


def test_several_grids_are_all_named(tmp_path: Path):
    model = on_grid(Grid(4, 32))
    model.model.layers[0].mlp.up_proj = on_grid(Grid(4, 32, False)).model.layers[0].mlp.up_proj
    from peft_lrqat.modules.packed import describe

    describe(model)
    del model.config.peft_lrqat
    model.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert "4 bits, symmetric, groups of 32" in found.grid
    assert "4 bits, asymmetric, groups of 32" in found.grid
    assert sum(found.histogram.values()) == found.weights


@pytest.mark.parametrize(
    "spec", [Spec("gptq", 4, 32, symmetric=False), Spec("awq", 4, 16), Spec("w8a8", 8, -1)], ids=str
)
def test_foreign_folders(spec: Spec, tmp_path: Path):
    write(tmp_path, spec)
    found = inspect(tmp_path)
    assert (found.bits, found.group_size, found.container_bits) == (spec.bits, spec.group_size, spec.bits)
    assert found.symmetric == (spec.symmetric and spec.method != "awq")
    assert found.act_bits == (8 if spec.method == "w8a8" else None)
    assert found.layer_bytes < found.total_bytes
    assert found.engines
