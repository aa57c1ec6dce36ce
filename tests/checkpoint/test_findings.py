"""What results say in words."""

from __future__ import annotations

from peft_lrqat import can_export
from peft_lrqat.grid import Grid
from tests.grids import on_grid


def test_layers_alike_share_a_line():
    check = can_export(on_grid(Grid(4, 8), num_hidden_layers=3), "gptq")
    assert len(check.problems) == 21
    assert str(check).count("\n") == 1
    assert "model.layers.0.self_attn.q_proj and 20 more: groups of 8" in str(check)


def test_what_is_allowed_already_is_not_said_to_help():
    model = on_grid(Grid(4, 8))
    assert "allow_inexact" in str(can_export(model, "bitnet"))
    check = can_export(model, "bitnet", allow_inexact=True)
    assert not check
    assert "allow_inexact" not in str(check)
