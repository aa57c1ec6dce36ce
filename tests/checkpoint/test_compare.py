"""A comparison finds any change, and sees through what a file only repeats."""

from __future__ import annotations

import copy

import pytest
import torch

from peft_lrqat import export
from peft_lrqat.checkpoint import compare
from peft_lrqat.checkpoint import export as exporting
from peft_lrqat.checkpoint.open import open_source
from peft_lrqat.checkpoint.verify import verify
from peft_lrqat.grid import Grid
from tests.grids import on_grid
from tests.quantized_files import Spec, write

LAYER = "model.layers.0.mlp.up_proj"


def change_code(layer):
    layer.weight_packed[0, 0] ^= 1


def change_scale(layer):
    layer.weight_scale[0, 0] *= 2


def change_zero_point(layer):
    layer.weight_zero_point[0, 0] ^= 1


@pytest.mark.parametrize("change", [change_code, change_scale, change_zero_point])
def test_one_number_is_enough(change):
    model = on_grid(Grid(4, 32, False))
    other = copy.deepcopy(model)
    assert compare.integers(open_source(model), open_source(other)).equal
    change(other.get_submodule(LAYER))
    found = compare.integers(open_source(model), open_source(other))
    assert not found.equal
    assert f"1 of 7 layers differ: {LAYER}" in found.detail


def test_other_tensors():
    model = on_grid(Grid(4, 32))
    other = copy.deepcopy(model)
    assert compare.floats(open_source(model), open_source(other)).equal
    other.model.norm.weight.data[0] += 1
    assert compare.floats(open_source(model), open_source(other)).detail == "model.norm.weight differs"
    other.model.norm.weight.data[0] -= 1
    other.model.norm.float()
    said = compare.floats(open_source(model), open_source(other)).detail
    assert said == "model.norm.weight is bfloat16, and float32 in the source, with equal values"
    other.model.norm = None
    assert "missing: model.norm.weight" in compare.floats(open_source(other), open_source(model)).detail
    assert "model.norm.weight is not in the source" in compare.floats(open_source(model), open_source(other)).detail


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "gguf"])
def test_exact_is_said_only_of_files_that_were_read_back(format: str, tmp_path, monkeypatch):
    """A writer that wrote something else is found before the folder appears."""
    model = on_grid(Grid(4, 32))
    options = {"vocabulary": False} if format == "gguf" else {}
    made = exporting.writer_of(format)
    write = type(made).write

    def wrong(self, source, folder, settings, progress):
        read = source.layer

        def layer(name):
            weight = read(name)
            if name == LAYER:
                weight.codes[0, 0] ^= 1
            return weight

        monkeypatch.setattr(source, "layer", layer)
        try:
            return write(self, source, folder, settings, progress)
        finally:
            monkeypatch.setattr(source, "layer", read)

    monkeypatch.setattr(type(made), "write", wrong)
    with pytest.raises(RuntimeError, match="What was written is not what was trained"):
        export(model, tmp_path / "out", format, progress=False, **options)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(type(made), "write", write)
    assert export(model, tmp_path / "out", format, progress=False, **options).loss is None
    assert torch.equal(model.get_submodule(LAYER).codes, open_source(model).layer(LAYER).codes)


def test_how_inputs_are_rounded_is_compared_too(tmp_path):
    write(tmp_path / "a", Spec("w8a8", 8, -1))
    write(tmp_path / "b", Spec("integers", 8, -1))
    found = verify(tmp_path / "a", against=tmp_path / "b", engine=False)
    assert [finding.equal for finding in found.findings] == [True, True, False]
    assert "127.5 steps" in found.findings[2].detail


def test_another_model_is_unequal_and_not_run_beside_the_first(tmp_path):
    on_grid(Grid(4, 32)).save_pretrained(tmp_path / "a")
    on_grid(Grid(4, 32), intermediate_size=128).save_pretrained(tmp_path / "b")
    found = verify(tmp_path / "a", against=tmp_path / "b")
    assert not found
    assert found.skipped == "the two are models of other layers or sizes"
    assert [finding.what for finding in found.findings] == ["codes, scales, zero points", "other tensors"]
    assert not found.findings[0].equal
