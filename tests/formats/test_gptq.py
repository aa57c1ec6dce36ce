"""What is GPTQ's own: repeated scales, layers left out, its two versions, fp16 scales."""

from __future__ import annotations

import pytest
import torch

from peft_lrqat import can_export, export
from peft_lrqat.grid import Grid
from tests.files import described, read
from tests.grids import on_grid


def test_a_channels_scale_is_repeated_in_groups(tmp_path):
    model = on_grid(Grid(4, -1), hidden_size=128, intermediate_size=256)
    assert export(model, tmp_path / "128", "gptq", progress=False).container == "gptq, 4 bits, groups of 128"
    assert described(tmp_path / "128")["group_size"] == 128
    model = on_grid(Grid(4, -1))  # 64 and 96 inputs
    assert export(model, tmp_path / "32", "gptq", progress=False).container == "gptq, 4 bits, groups of 32"


def test_layers_left_out_are_named(tmp_path):
    model = on_grid(Grid(4, 32), num_hidden_layers=2, leave_out=("layers.1.mlp",))
    export(model, tmp_path / "out", "gptq", progress=False)
    config = described(tmp_path / "out")
    assert config["dynamic"].keys() == {rf"-:^model\.layers\.1\.mlp\.{part}_proj$" for part in ("gate", "up", "down")}
    (packed,) = config["modules_in_block_to_quantize"]
    assert "model.layers.0.mlp.up_proj" in packed
    assert not any("layers.1.mlp" in name for name in packed)
    export(on_grid(Grid(4, 32)), tmp_path / "all", "gptq", progress=False)
    assert not {"dynamic", "modules_in_block_to_quantize"} & described(tmp_path / "all").keys()


def test_the_lowest_zero_point_needs_version_2(tmp_path):
    model = on_grid(Grid(4, 32, False))
    layer = model.model.layers[0].mlp.up_proj
    layer.weight_zero_point.zero_()  # every zero point at code -8
    with pytest.raises(ValueError, match="gptq_v2"):
        export(model, tmp_path / "out", "gptq", progress=False)
    assert not (tmp_path / "out").exists()
    export(model, tmp_path / "out", "gptq", checkpoint_format="gptq_v2", progress=False)
    assert described(tmp_path / "out")["checkpoint_format"] == "gptq_v2"
    assert not read(tmp_path / "out")["model.layers.0.mlp.up_proj.qzeros"].any()


def test_scales_that_fp16_cannot_hold_are_refused_or_measured(tmp_path):
    model = on_grid(Grid(4, 32), dtype=torch.float32, scale_dtype="fp32")
    check = can_export(model, "gptq")
    assert not check
    assert "not exact in float16" in str(check)
    assert can_export(model, "gptq", allow_inexact=True)
    with pytest.raises(ValueError, match="allow_inexact"):
        export(model, tmp_path / "out", "gptq", progress=False)
    report = export(model, tmp_path / "out", "gptq", allow_inexact=True, progress=False)
    assert report.loss.layers == 7
    assert 1e-6 < report.loss.relative < 2**-11
    assert "NOT exact" in str(report)
    assert "not* exact" in (tmp_path / "out" / "README.md").read_text()
