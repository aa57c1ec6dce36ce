"""A source reads the same integers, and the same other tensors, from every form in which a trained model comes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_lrqat.checkpoint.open import open_adapter, open_source
from peft_lrqat.formats.source import Source
from peft_lrqat.grid import GridTensor
from tests.files import read
from tests.models import logits, tokens
from tests.trained import trained

KINDS = ["asymmetric", "tied", "head", "tokens", "gpt2", "embedding", "ternary", "projected", "int8", "w4a8", "bitnet"]


def contents(source: Source) -> tuple[dict[str, GridTensor], dict[str, torch.Tensor]]:
    return {name: source.layer(name) for name in source.grids()}, dict(source.floats(packed=source.grids()))


def assert_equal(a: GridTensor, b: GridTensor) -> None:
    assert a.grid == b.grid
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)
    assert (a.zero_point is None) == (b.zero_point is None) == a.grid.symmetric
    assert a.grid.symmetric or torch.equal(a.zero_point, b.zero_point)


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_merged_and_saved_models_read_alike(kind: str, tmp_path: Path):
    model = trained(kind, tmp_path / "base")
    before = logits(model, tokens())
    adapter = open_source(model)
    expected, floats = contents(adapter)
    assert torch.equal(logits(model, tokens()), before)
    model.save_pretrained(tmp_path / "adapter")
    sources = [adapter, open_source(tmp_path / "adapter")]
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    saved = {name: t for name, t in read(tmp_path / "merged").items() if not name.endswith("weight_shape")}
    if kind not in ("gpt2", "embedding"):  # merging leaves dense weights there, whose grid is not recorded
        sources += [open_source(merged), open_source(tmp_path / "merged")]
    for source in sources:
        tensors, others = contents(source)
        assert tensors.keys() == expected.keys() == source.grids().keys()
        for name, info in source.grids().items():
            assert_equal(tensors[name], expected[name])
            assert tensors[name].codes.shape == (info.out_features, info.in_features)
            assert (info.grid, info.dtype) == (adapter.grids()[name].grid, torch.bfloat16)
            assert info.container_bits == adapter.grids()[name].container_bits
        assert others.keys() == floats.keys()
        assert all(torch.equal(others[name], floats[name]) for name in floats)
        assert {"weight_scale", "scale_shift"}.isdisjoint(name.rpartition(".")[2] for name in others)
        assert source.activations() == adapter.activations()
        assert (source.recipe, source.scale_dtype) == (adapter.recipe, "auto")
        assert source.config.architectures == [type(merged).__name__]
        assert sorted(source.float_linears) == sorted(adapter.float_linears)
        assert not hasattr(source.config, "quantization_config")
        # nothing packed: every weight comes out dense, under the names and with the values of the merged model
        dense = dict(source.floats())
        state = {n: t for n, t in merged.state_dict().items() if t.is_floating_point() and n in dense}
        assert set(dense) == set(floats) | {name + ".weight" for name in expected}
        assert all(torch.equal(dense[name], state[name]) for name in state)
    dense = {name + ".weight" for name in expected}
    assert set(floats) == {n for n in saved if ".weight_" not in n} - dense


class TestRefusals:
    def test_missing_and_empty_folders(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            open_source(tmp_path / "nowhere")
        with pytest.raises(ValueError, match=r"neither config\.json"):
            open_source(tmp_path)

    def test_what_a_trainer_writes_without_save_model(self, tmp_path):
        """Its checkpoints lie one folder deeper than the user looks for the adapter."""
        for step in (9, 10):
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "adapter_config.json").write_text("{}")
        for opening in (open_source, open_adapter):
            with pytest.raises(ValueError, match=r"checkpoint-10' holds one.*save_model"):
                opening(tmp_path)

    def test_other_things(self):
        with pytest.raises(ValueError, match="dict"):
            open_source({})
