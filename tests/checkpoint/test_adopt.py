"""A compressed-tensors model that transformers loaded, packed or after its first forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.models import logits, tokens
from tests.quantized_files import Spec, adapt, write

IDS = tokens()
LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("ran", [False, True], ids=["packed", "after a forward"])
@pytest.mark.parametrize("spec", [Spec("packed", 3, 16), Spec("packed", 8, -1, dtype=torch.bfloat16)], ids=str)
def test_a_model_that_transformers_loaded(spec: Spec, ran: bool, tmp_path: Path):
    expected = logits(write(tmp_path, spec), IDS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    if ran:
        assert torch.equal(logits(model, IDS), expected)
    adapted = adapt(model)
    assert torch.equal(logits(adapted, IDS), expected)
    adapted.unload().save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), IDS), expected)


def test_a_weight_that_left_its_grid_after_loading(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    write(tmp_path, Spec("packed", 4, 32))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model(input_ids=torch.tensor([[3, 4]]))
    layer: nn.Linear = model.get_submodule(LAYER)
    layer.weight.data[0, 0] += 0.013
    with pytest.raises(ValueError, match="does not lie on its grid any more"):
        adapt(model)


def test_rounded_activations_are_not_dropped_in_silence(tmp_path: Path):
    write(tmp_path, Spec("w8a8", 8, -1))
    with pytest.raises(ValueError, match="Int8Linear"):
        adapt(AutoModelForCausalLM.from_pretrained(tmp_path))
