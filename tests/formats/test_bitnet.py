"""What is BitNet's own: ternary weights with one scale, and activations rounded by its rule."""

from __future__ import annotations

import pytest

from peft_lrqat import can_export, export
from peft_lrqat.grid import Grid
from tests.grids import on_grid

TERNARY = [Grid(1.58, group) for group in (-1, 32, 0)]


@pytest.mark.parametrize(("grid", "act", "said"), [
    (Grid(2, 0), None, "ternary weights"),
    (TERNARY[0], None, "one scale a tensor"),
    (TERNARY[2], None, "act_bits=8"),
    (TERNARY[2], "compressed-tensors", "127.5 steps"),
])  # fmt: skip
def test_what_it_cannot_hold(grid: Grid, act: str | None, said: str):
    check = can_export(on_grid(grid, act=act), "bitnet")
    assert not check
    assert said in str(check)


def test_its_activations_are_not_those_of_compressed_tensors(tmp_path):
    model = on_grid(TERNARY[2], act="bitnet")
    assert "127.5" in str(can_export(model, "compressed-tensors"))
    report = export(model, tmp_path / "out", allow_inexact=True, progress=False)
    assert "127.5 steps" in str(report)
    assert "float activations" in str(can_export(model, "gptq"))
