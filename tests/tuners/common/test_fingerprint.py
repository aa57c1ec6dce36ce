"""Fingerprints and checksums: two weights never have the same, and those of earlier files still count."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_lrqat.tuners.common.fingerprint import (
    as_tensor,
    check_fingerprint,
    dtype_of,
    float_checksum,
    in_order,
    of_tensor,
    position_weighted_sum,
)
from tests.models import adapted, logits, tiny, tokens

IDS = tokens()


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_values_that_change_places_change_the_sum():
    rows = set(itertools.permutations((1, 2, 2, 1, 3, 5)))
    for as_columns in (False, True):
        matrices = [torch.tensor(row).view((6, 1) if as_columns else (1, 6)) for row in rows]
        assert len({int(position_weighted_sum(matrix, 1)) for matrix in matrices}) == len(rows)
        assert len({float_checksum(matrix.float()) for matrix in matrices}) == len(rows)
        assert len({int(position_weighted_sum(matrix, 1, version=1)) for matrix in matrices}) < len(rows)
    assert len({in_order(row) for row in rows}) == len(rows)


def test_a_pattern_that_moves_in_two_dimensions_changes_the_sum():
    matrix = torch.zeros(64, 64, dtype=torch.int8)
    matrix[3:5, 8:10] = torch.tensor([[1, -1], [-1, 1]])
    sums = {int(position_weighted_sum(matrix.roll((i, j), (0, 1)), 1)) for i in range(20) for j in range(20)}
    assert len(sums) == 400


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("value", [0, 5, 2**63, 2**64 - 1])
def test_a_file_gives_back_the_checksum(version: int, value: int):
    checksum = in_order([value], version)
    assert of_tensor(as_tensor(checksum)) == checksum


def test_a_checksum_of_a_later_version_is_refused():
    with pytest.raises(ValueError, match=r"checksum has version 3; this version of peft-lrqat knows 1 and 2"):
        of_tensor(torch.tensor([5, 3]))


def test_an_average_of_adapters_says_what_to_leave_alone():
    model = adapted(tiny(num_hidden_layers=1))
    saved = get_peft_model_state_dict(model)
    halves = {key: 0.5 * tensor for key, tensor in saved.items()}
    with pytest.raises(ValueError, match=r"`...base_checksum`\) is torch.float32; it must be torch.int64"):
        set_peft_model_state_dict(model, halves)
    (kept,) = (key for key in saved if key.endswith("base_checksum"))
    set_peft_model_state_dict(model, {**halves, kept: saved[kept]})


def test_fingerprints_of_two_versions_are_not_compared_but_those_of_integers_and_floats_are():
    check_fingerprint("v2:0000000000000001", "0000000000000002")
    with pytest.raises(ValueError, match="its integers had the fingerprint"):
        check_fingerprint("v2:0000000000000001", "int:0000000000000002")
    with pytest.raises(ValueError, match="its float weights had the fingerprint"):
        check_fingerprint("v2:0000000000000001", "v2:0000000000000002")


def test_the_dtype_of_a_base_is_that_of_most_of_its_layers():
    dtypes = {"a": torch.float32, "b": torch.bfloat16, "c": torch.bfloat16}
    layers: dict[str, torch.nn.Module] = {name: torch.nn.Linear(2, 2, dtype=dtype) for name, dtype in dtypes.items()}
    assert dtype_of(layers) == "bfloat16"
    assert dtype_of({}) is None  # the names of modules are checked later
    with pytest.raises(ValueError, match="no module of this model is called so"):
        adapted(tiny(), target_modules=["nothing"])


@pytest.mark.parametrize("keeps_base", [True, False])
def test_an_adapter_of_version_1_loads_on_its_base_only(
    method: ModuleType, base_folder: Path, tmp_path: Path, keeps_base: bool
):
    options = {} if keeps_base or method.TYPE != "LOWBITSR" else {"keep_base": False}
    model = method.adapt(load(base_folder), bits=4, **options).eval()
    model.save_pretrained(tmp_path)
    frozen = [layer.frozen for layer in method.layers(model).values()]
    checksum = in_order((int(each.checksum(version=1)) for each in frozen), version=1)
    path = tmp_path / "adapter_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "base_checksum": checksum, "base_fingerprint": "0123456789abcdef"})
    )
    path = tmp_path / "adapter_model.safetensors"
    values = load_file(path)
    (name,) = (key for key in values if key.endswith("_base_checksum"))
    save_file({**values, name: as_tensor(checksum)}, path)
    again = PeftModel.from_pretrained(load(base_folder), tmp_path).eval()
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    assert again.peft_config["default"].base_checksum == model.peft_config["default"].base_checksum
    with pytest.raises(ValueError, match="trained on another base: its integers have the checksum"):
        PeftModel.from_pretrained(tiny(seed=1), tmp_path)
