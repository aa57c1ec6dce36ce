"""What every format in safetensors files checks of a source before it writes."""

from __future__ import annotations

import pytest
import torch

from peft_lrqat import can_export, export
from peft_lrqat.grid import Grid
from tests.grids import on_grid


@pytest.mark.parametrize("format", ["compressed-tensors", "torchao", "gptq"])
def test_a_scale_that_the_file_cannot_hold_is_a_problem_not_a_rounding(format: str, tmp_path):
    model = on_grid(Grid(4, 32), dtype=torch.float16, scale_dtype="auto")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight_scale = layer.weight_scale.float() * 1.0001  # nobody's dtype but fp32
    model.config.peft_lrqat["scale_dtype"] = None
    check = can_export(model, format)
    assert not check
    assert "model.layers.0.mlp.up_proj: " in str(check)
    assert "scales are not exact in float" in str(check)
    report = export(model, tmp_path / "out", format, allow_inexact=True, progress=False)
    assert report.loss.layers == 1
    assert "NOT exact" in str(report)


@pytest.mark.parametrize("format", ["torchao", "gptq", "bitnet"])
def test_several_grids_need_a_format_that_holds_them(format: str):
    model = on_grid(Grid(4, 32))
    mixed = on_grid(Grid(3, 32), container_bits=4)
    model.model.layers[0].mlp.up_proj = mixed.model.layers[0].mlp.up_proj
    assert "is not that of the other layers" in str(can_export(model, format))
    assert can_export(model, "compressed-tensors")
