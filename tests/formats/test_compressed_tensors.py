"""What is compressed-tensors' own: it is what `save_pretrained` of a merged model writes; several grids."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from peft_lrqat import export, packing
from peft_lrqat.formats import compressed_tensors, reading
from peft_lrqat.formats.source import Loading
from peft_lrqat.grid import Grid
from peft_lrqat.ops.activations import Activations
from tests.files import read
from tests.grids import on_grid, random_tensor


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


def _old_packing(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """As compressed-tensors packed before 0.18: whole codes a word, the rest of its bits unused."""
    per_word = 32 // bits
    unsigned = torch.nn.functional.pad(codes.long() + (1 << (bits - 1)), (0, -codes.shape[1] % per_word))
    shifted = unsigned.view(codes.shape[0], -1, per_word) << (torch.arange(per_word) * bits)
    return shifted.sum(-1).to(torch.int32)


@pytest.mark.parametrize(("bits", "columns"), [(3, 40), (5, 24), (6, 40), (7, 24), (3, 64)])
def test_old_packings_are_told_apart_by_words_or_version_or_refused(bits: int, columns: int):
    codes = random_tensor(Grid(bits, -1), 8, columns).codes
    tensors = {
        "weight_packed": _old_packing(codes, bits),
        "weight_scale": torch.ones(8, 1),
        "weight_shape": torch.tensor([8, columns]),
    }
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    config = {"format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}

    def read(**said) -> torch.Tensor:
        scheme = compressed_tensors.schemes({**config, **said}, {})("x")
        return reading.read(scheme, tensors, 8, columns, "x").codes

    assert torch.equal(read(version="0.9.4"), codes)
    if columns == 64:  # another number of words
        assert torch.equal(read(), codes)
        return
    with pytest.raises(ValueError, match="nothing tells which this is; set `version`"):
        read()
    tensors["weight_packed"] = packing.pack(codes, bits)
    assert torch.equal(read(), codes)
    assert torch.equal(read(version="0.20.0"), codes)


def test_names_come_before_patterns_and_patterns_in_their_order():
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {
        str(bits): {"targets": [target], "weights": {**weights, "num_bits": bits}, "format": "pack-quantized"}
        for bits, target in ((8, "Linear"), (4, "re:.*proj"), (3, "re:.*down.*"), (2, "a.down_proj"))
    }
    scheme_of = compressed_tensors.schemes({"config_groups": groups}, {})
    assert [scheme_of(name).bits for name in ("a.down_proj", "b.down_proj", "b.up_proj", "c")] == [2, 3, 4, 8]
    assert scheme_of("language_model.c", "model.language_model.c").bits == 8
    assert scheme_of("language_model.a.down_proj", "a.down_proj").bits == 2  # the name in the file, and in the model


SYMMETRIC, ASYMMETRIC = (Grid(4, -1), 4, None), (Grid(4, -1, False), 4, None)
ACTIVATIONS = (Grid(8, -1), 8, Activations("vllm"))


@pytest.mark.parametrize(
    ("layers", "loading", "problem"),
    [
        ([SYMMETRIC, SYMMETRIC], Loading(early=True), ""),
        ([SYMMETRIC, (Grid(8, -1), 8, None)], Loading(), ""),
        ([ASYMMETRIC], Loading(), ""),
        ([SYMMETRIC, ASYMMETRIC], Loading(), "reads zero points.*one grid for all layers"),
        ([SYMMETRIC, (Grid(8, -1), 8, None)], Loading(early=True), "before the first forward.*one grid for all layers"),
        ([ACTIVATIONS], Loading(early=True), "rounds no activations"),
        ([SYMMETRIC], Loading(joins=True, cuts="a.weight"), "cuts the tensor 'a.weight'"),
    ],
)
def test_what_transformers_cannot_load_is_known(layers, loading: Loading, problem: str):
    found = compressed_tensors.loading_problem(layers, loading)
    assert re.search(problem, found) if problem else not found
    described = compressed_tensors.quantization_config([], dict(zip("abcd", layers, strict=False)), loading)
    assert compressed_tensors.stored_problem(described, layers, loading) == found


def test_a_checkpoint_that_does_not_say_what_transformers_needs():
    described = compressed_tensors.quantization_config([], {"a": SYMMETRIC})
    for loading, lacking in ((Loading(early=True), "`dequantize`: true"), (Loading(joins=True), "group for the exp")):
        assert lacking in compressed_tensors.stored_problem(described, [SYMMETRIC], loading)


@pytest.mark.parametrize(
    "entry", [{"weights": {"num_bits": "many"}}, {"weights": []}, "W8A8", {"targets": [None], "weights": {}}], ids=str
)
def test_an_entry_of_another_shape_is_a_sentence(entry):
    with pytest.raises(ValueError, match=r"is not as this format has it|can be read"):
        reading.describe({"quant_method": "compressed-tensors", "config_groups": {"group_0": entry}})("x")
