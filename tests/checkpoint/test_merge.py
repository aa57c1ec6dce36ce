"""`merge` writes what `merge_and_unload()` and `save_pretrained` do, as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_lrqat.checkpoint import merge as merging
from peft_lrqat.checkpoint.merge import merge
from tests.models import adapted, tiny, tokens, train


def trained(folder: Path, family: str, **options):
    """A trained PeftModel; its base and adapter lie in `folder`, a tokenizer beside the base."""
    base = tiny(family, **({"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}))
    base.save_pretrained(folder / "base")
    (folder / "base" / "tokenizer_config.json").write_text("{}")
    base.name_or_path = str(folder / "base")
    model = adapted(base, range_method="minmax", **options)
    train(model, tokens())
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize(("family", "options", "said"), [
    ("qwen2", {"bits": 3, "group_size": 8}, "compressed-tensors (3 bits), 7 layers on the grid 3 bits"),
    # transformers' GPT-2 has Conv1D layers, which no format packs
    ("gpt2", {"bits": 4, "group_size": -1}, "safetensors (floats), 4 layers on the grid 4 bits"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:compressed-tensors cannot pack")
def test_the_merged_model_is_saved(family, options, said, tmp_path):
    model = trained(tmp_path, family, **options)
    report = str(merge(tmp_path / "adapter", tmp_path / "out"))
    assert f"{tmp_path}/out: {said}" in report
    assert "exact: codes and scales are the trained ones" in report
    expected = model.merge_and_unload()(tokens()).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens()).logits, expected)
    assert {"README.md", "tokenizer_config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_what_fails_leaves_nothing(tmp_path, monkeypatch):
    trained(tmp_path, "qwen2", bits=4, group_size=8)

    def fail(*args):
        raise RuntimeError("What was written is not what was trained")

    monkeypatch.setattr(merging, "check_written", fail)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RuntimeError, match="not what was trained"):
        merge(tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(ValueError, match="holds no adapter"):
        merge(tmp_path / "base", tmp_path / "out")
    with pytest.raises(FileExistsError, match="lost"):
        merge(tmp_path / "adapter", tmp_path / "base", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_finds_its_base_in_the_dtype_that_it_was_trained_in(tmp_path: Path):
    tiny().save_pretrained(tmp_path / "base")  # float32
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    trained = adapted(model)
    trained.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert served.dtype is torch.bfloat16
    ids = torch.arange(3, 11)[None]
    assert torch.equal(served(ids).logits, trained.merge_and_unload()(ids).logits)
