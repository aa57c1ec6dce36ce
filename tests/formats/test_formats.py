"""Every format, at every grid it holds: codes and scales as that format's own reader finds them, and equal logits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors import safe_open
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

from peft_lrqat import can_export, export
from peft_lrqat.checkpoint.open import open_source
from peft_lrqat.grid import Grid, GridTensor
from tests.files import described, read
from tests.grids import on_grid
from tests.models import logits, reload_clean, tokens

# Zero points are packed by the width of the codes, so every width meets both kinds of grid; scales are laid out by what
# shares them, whatever the width, so every granularity meets both kinds once or more.
GRIDS = [
    Grid(2, -1), Grid(2, 32, False), Grid(3, 32), Grid(3, 0, False),
    Grid(4, 0), Grid(4, -1, False), Grid(8, 32), Grid(8, 0, False),
]  # fmt: skip
TERNARY = [Grid(1.58, group) for group in (-1, 32, 0)]


@dataclass(frozen=True)
class Case:
    format: str
    grid: Grid
    container_bits: int | None = None
    act: str | None = None
    dtype: torch.dtype = torch.bfloat16
    reload: bool = True

    def __str__(self) -> str:
        parts = (self.format, self.grid.describe(), self.container_bits and f"in {self.container_bits}", self.act)
        return "-".join(str(part) for part in parts if part).replace(" ", "_").replace(",", "")

    def model(self):
        return on_grid(self.grid, dtype=self.dtype, act=self.act)

    @property
    def width(self) -> int:
        return self.container_bits or self.grid.code_bits


CASES = [
    # `save_pretrained` writes the same files (below), and test_merge.py loads those
    *(Case("compressed-tensors", grid, reload=grid == Grid(3, 0, False)) for grid in [*GRIDS, *TERNARY]),
    *(Case("compressed-tensors", grid, width) for grid, width in
      [(Grid(3, -1, False), 4), (TERNARY[0], 4)]),
    *(Case("compressed-tensors", grid, 8, act="compressed-tensors") for grid in (Grid(8, -1), Grid(4, 0), TERNARY[2])),
    *(Case("torchao", grid, reload=grid.group_size == 32) for grid in [*GRIDS, *TERNARY]),
    Case("torchao", Grid(3, 32), 4),
    # its engines compute in fp16; gptqmodel reads these in engines
    *(Case("gptq", grid, reload=False, dtype=torch.float16) for grid in [*GRIDS, *TERNARY]),
    Case("gptq", Grid(3, 32, False), 4, reload=False),
    Case("bitnet", TERNARY[2], act="bitnet", dtype=torch.float32),
    Case("bitnet", TERNARY[2], act="bitnet"),
]  # fmt: skip


@dataclass
class Result:
    folder: Path
    expected: torch.Tensor
    tensors: dict[str, GridTensor]
    floats: dict[str, torch.Tensor]
    reloaded: torch.Tensor | None = None


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[Case, Result]:
    """Every case written, then loaded in one process that has no plugin."""
    work = tmp_path_factory.mktemp("formats")
    found = {}
    for i, case in enumerate(CASES):
        model, folder = case.model(), work / str(i)
        assert can_export(model, case.format, container_bits=case.container_bits)
        report = export(model, folder, case.format, container_bits=case.container_bits, progress=False)
        assert report.loss is None
        source = open_source(model)
        tensors = {name: source.layer(name) for name in source.grids()}
        floats = dict(source.floats(source.grids()))
        found[case] = Result(folder, logits(model, tokens()) if case.reload else torch.empty(0), tensors, floats)
    again = [result for case, result in found.items() if case.reload]
    for result, reloaded in zip(again, reload_clean([r.folder for r in again], tokens(), work), strict=True):
        result.reloaded = reloaded
    return found


def by_reader(case: Case, result: Result) -> dict[str, tuple]:
    """Module -> (codes, scales, zero points or None), from the file and nothing else."""
    reader = {"compressed-tensors": _compressed_tensors, "torchao": _torchao, "gptq": _gptq, "bitnet": _bitnet}
    return {name: reader[case.format](case, result.folder, name) for name in result.tensors}


def _compressed_tensors(case: Case, folder: Path, name: str) -> tuple:
    tensors = {key.removeprefix(name + "."): t for key, t in read(folder).items() if key.startswith(name + ".")}
    weights = described(folder)["config_groups"]["group_0"]["weights"]
    if case.act:
        return tensors["weight"], tensors["weight_scale"], None
    bits, (rows, cols) = weights["num_bits"], tensors["weight_shape"].tolist()
    assert bits == case.width
    codes = unpack_from_int32(tensors["weight_packed"], bits, torch.Size((rows, cols)))
    zero = tensors.get("weight_zero_point")
    if zero is not None:
        zero = unpack_from_int32(zero, bits, torch.Size((rows, tensors["weight_scale"].shape[1])), packed_dim=0)
    return codes, tensors["weight_scale"], zero


def _torchao(case: Case, folder: Path, name: str) -> tuple:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors, left_over = unflatten_tensor_state_dict(read(folder), file.metadata())
    assert not left_over
    weight = tensors[name + ".weight"]
    assert weight.target_dtype == getattr(torch, f"int{case.width}")
    zero = None if case.grid.symmetric else weight.zero_point
    assert zero is not None or not weight.zero_point.any()
    return weight.qdata, weight.scale, zero


def _gptq(case: Case, folder: Path, name: str) -> tuple:
    """Bit by bit, as the format is documented: integers in little-endian streams, zeros less one."""
    tensors = {key.removeprefix(name + "."): t.numpy() for key, t in read(folder).items() if key.startswith(name + ".")}
    config = described(folder)
    assert json.loads((folder / "quantize_config.json").read_text()) == config
    bits, cols = config["bits"], len(tensors["g_idx"])

    def stream(words):  # (lines, words) to (lines, numbers)
        each = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
        return each.reshape(len(words), -1, bits) @ (1 << np.arange(bits))

    levels = stream(tensors["qweight"].T)
    zeros = (stream(tensors["qzeros"]) + 1).T  # (out, groups)
    assert levels.shape[1] == cols
    group = config["group_size"] if config["group_size"] > 0 else cols
    assert (tensors["g_idx"] == np.arange(cols) // group).all()
    assert config["sym"] == case.grid.symmetric
    assert (zeros == 2 ** (bits - 1)).all() or not case.grid.symmetric
    assert tensors["scales"].dtype == np.float16
    codes = torch.from_numpy(levels - 2 ** (bits - 1))
    zero = None if case.grid.symmetric else torch.from_numpy(zeros - 2 ** (bits - 1))
    return codes, torch.from_numpy(tensors["scales"].T.copy()), zero


def _bitnet(case: Case, folder: Path, name: str) -> tuple:
    tensors = read(folder)
    stored = tensors[name + ".weight"]
    codes = torch.cat([(stored >> shift & 3) for shift in (0, 2, 4, 6)]).to(torch.int8) - 1
    return codes, tensors[name + ".weight_scale"].view(1, 1), None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_and_scales_are_the_trained_ones(results, case: Case):
    for name, (codes, scale, zero) in by_reader(case, results[case]).items():
        trained = results[case].tensors[name]
        assert torch.equal(codes.int(), trained.codes.int())
        assert (trained.codes.min(), trained.codes.max()) == (case.grid.qmin, case.grid.qmax)
        # an engine may want a scale repeated: per row for one per tensor, per group for one per channel
        repeats = scale.shape[1] // trained.scale.shape[1]
        assert torch.equal(scale.float(), trained.scale.repeat_interleave(repeats, 1).expand(scale.shape))
        assert (zero is None) == case.grid.symmetric
        if zero is not None:
            assert torch.equal(zero.int(), trained.zero_point.int().repeat_interleave(repeats, 1).expand(zero.shape))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_other_tensor_is_unchanged(results, case: Case):
    stored = read(results[case].folder)
    floats = results[case].floats
    assert all(torch.equal(stored[name], floats[name]) for name in floats)
    modules = tuple(name + "." for name in results[case].tensors)
    assert {name for name in stored if not name.startswith(modules)} == set(floats)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_folder_can_be_opened_again(results, case: Case):
    source = open_source(results[case].folder)
    assert source.grids().keys() == results[case].tensors.keys()
    for name, trained in results[case].tensors.items():
        again = source.layer(name)
        assert again.grid == case.grid
        assert torch.equal(again.codes, trained.codes)
        assert torch.equal(again.scale, trained.scale)
        assert case.grid.symmetric or torch.equal(again.zero_point, trained.zero_point)
        assert (source.grids()[name].dtype, source.grids()[name].container_bits) == (case.dtype, case.width)
    floats = dict(source.floats(source.grids()))
    assert floats.keys() == results[case].floats.keys()
    assert "lm_head" in source.float_linears


@pytest.mark.parametrize("case", [case for case in CASES if case.reload], ids=str)
def test_plain_transformers_computes_the_same(results, case: Case):
    result = results[case]
    assert torch.isfinite(result.expected).all()
    assert result.reloaded.dtype == case.dtype
    assert torch.equal(result.reloaded, result.expected)
