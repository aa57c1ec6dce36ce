"""A checkpoint on disk as a source; what it refuses is in tests/formats/test_reading.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers as T
from safetensors.torch import load_file, save_file

from peft_lrqat import export
from peft_lrqat.checkpoint.open import open_source
from tests.models import adapted, tiny
from tests.trained import trained


def test_the_grid_is_recorded_in_a_wider_container(tmp_path: Path):
    merged = trained("asymmetric").merge_and_unload()
    merged.save_pretrained(tmp_path)
    grids = open_source(tmp_path).grids().values()
    assert {(g.grid.bits, g.grid.symmetric, g.container_bits) for g in grids} == {(3, False, 4)}
    described = json.loads((tmp_path / "config.json").read_text())
    del described["peft_lrqat"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert {g.grid.bits for g in open_source(tmp_path).grids().values()} == {4}


def test_float_checkpoints(tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="float"):
        open_source(tmp_path)


def test_codes_outside_of_the_recorded_grid(tmp_path):
    trained("int8").merge_and_unload().save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["peft_lrqat"]["bits"] = 2
    (tmp_path / "config.json").write_text(json.dumps(described))
    source = open_source(tmp_path)
    with pytest.raises(ValueError, match="outside of the grid"):
        [source.layer(name) for name in source.grids()]


def test_truncated_files(tmp_path):
    trained("ternary").merge_and_unload().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        open_source(tmp_path)


_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
ARCHITECTURES = {
    "t5": (
        lambda: T.T5ForConditionalGeneration(
            T.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        ),
        ["q", "v"],
    ),
    "a classifier": (
        lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**_GROUPED, num_labels=3, pad_token_id=0)),
        ["q_proj"],
    ),
    "an encoder": (lambda: T.BertForSequenceClassification(T.BertConfig(**_SIZES, num_labels=3)), ["query", "value"]),
    "without a head": (lambda: T.LlamaModel(T.LlamaConfig(**_GROUPED)), ["q_proj"]),
    "experts": (lambda: T.MixtralForCausalLM(T.MixtralConfig(**_GROUPED, num_local_experts=2)), ["q_proj"]),
    "images": (
        lambda: T.LlavaForConditionalGeneration(
            T.LlavaConfig(
                vision_config=T.CLIPVisionConfig(**_SIZES, image_size=16, patch_size=8),
                text_config=T.LlamaConfig(**_GROUPED),
                image_token_index=5,
            )
        ),
        r".*language_model.*q_proj",
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folders_of_every_kind_of_architecture_are_whole_and_export(name: str, tmp_path: Path):
    """Files may name and cut tensors otherwise than the model does (experts, images), or hold tied ones once."""
    make, targets = ARCHITECTURES[name]
    model = adapted(make(), target_modules=targets, task_type=None, init_lora_weights=False)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    source = open_source(tmp_path / "merged")
    assert export(tmp_path / "merged", tmp_path / "out", progress=False).loss is None
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert state.keys() == load_file(tmp_path / "merged" / "model.safetensors").keys()
    lost = next(name for name in state if name.rpartition(".")[0] not in source.grids())
    del state[lost]
    save_file(state, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="missing"):
        open_source(tmp_path / "out")
