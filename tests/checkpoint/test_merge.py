"""`merge` writes what `merge_and_unload()` and `save_pretrained` do, as a whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_lrqat.checkpoint import merge as merging
from peft_lrqat.checkpoint.merge import merge
from peft_lrqat.checkpoint.verify import verify
from tests.models import adapted, logits, tiny, tokens, train


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


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize(("file", "used"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_an_adapter_finds_its_base_in_the_dtype_that_it_was_trained_in(file, used, noted, tmp_path):
    tiny(dtype=getattr(torch, file)).save_pretrained(tmp_path / "base")
    trained = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=used))
    trained.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(config.read_text())
    assert said.pop("base_dtype") == used
    if not noted:  # as in files of before it was
        config.write_text(json.dumps(said))
    merge(tmp_path / "adapter", tmp_path / "merged")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    # without a note, the values of the layers on the grid decide, and fp32 holds all of bf16
    assert served.dtype is getattr(torch, used if noted or file == "float32" else file)
    if served.dtype is getattr(torch, used):
        assert verify(tmp_path / "merged", trained, engine=False)
        assert torch.equal(logits(served, tokens()), logits(trained.merge_and_unload(), tokens()))


def test_a_model_made_fp32_after_it_was_adapted_is_opened_in_fp32(tmp_path):
    tiny(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    trained = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).float()
    trained.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert verify(tmp_path / "merged", trained, engine=False)
