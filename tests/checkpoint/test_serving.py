"""What users are told of engines that load a checkpoint and compute something else than was trained."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from peft import get_peft_model

from peft_lrqat import LRQATConfig, export
from peft_lrqat.checkpoint.inspect import inspect
from peft_lrqat.checkpoint.serving import serving
from peft_lrqat.checkpoint.verify import verify
from peft_lrqat.grid import Grid
from peft_lrqat.ops.activations import Activations
from peft_lrqat.ops.kv_cache import CacheRounding
from tests.architectures import ARCHITECTURES
from tests.models import adapted, tiny

TRANSFORMERS, VLLM = Activations("compressed-tensors"), Activations("vllm")
PACKED, INT8 = (Grid(4, 32), 4), (Grid(4, -1), 8)


@pytest.mark.parametrize(
    ("layers", "cache", "options", "said"),
    [
        ([(*PACKED, None)], None, "", []),
        ([(*INT8, VLLM)], None, "", ["transformers alone rounds activations otherwise"]),
        ([(*INT8, TRANSFORMERS)], None, "", ["127 steps"]),
        ([(*INT8, Activations("compressed-tensors", static=True))], None, "", []),
        ([(*PACKED, TRANSFORMERS)], None, "--linear-backend humming", ["leave activations float", "127 steps"]),
        ([(*PACKED, None)], CacheRounding(8, "transformers", 64), None, ["vLLM refuses the checkpoint"]),
        (
            [(*PACKED, None), (*PACKED, Activations("humming", 4))],
            CacheRounding(4, "vllm"),
            "--linear-backend humming --kv-cache-dtype int4_per_token_head",
            ["leave activations float", "transformers alone rounds", "transformers alone keeps it in floats"],
        ),
    ],
)
def test_what_is_said(layers: list, cache: CacheRounding | None, options: str | None, said: list[str]):
    found = serving("compressed-tensors", layers, cache)
    assert found.options == options
    assert len(found.notes) == len(said)
    for note, part in zip(found.notes, said, strict=True):
        assert part in note


def test_other_formats_say_of_the_cache_only():
    assert serving("gptq", [(*PACKED, TRANSFORMERS)], CacheRounding(8, "transformers", 64)) == ("", ())
    assert serving("gptq", [(*PACKED, None)], CacheRounding(8, "vllm")).options == (
        "--kv-cache-dtype int8_per_token_head"
    )


def test_a_user_is_told_on_every_road(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """W4A8 as it comes: vLLM's other kernels leave activations float, and say nothing."""
    warning = "leave activations float without a word"
    with caplog.at_level(logging.INFO, logger="peft_lrqat"):
        model = adapted(tiny(num_hidden_layers=1), bits=4, group_size=8, act_bits=8)
        assert warning in caplog.text
        caplog.clear()
        report = export(model, tmp_path / "exported")
        merged = model.merge_and_unload()
        assert caplog.text.count(warning) == 1
    assert warning in str(report)
    merged.save_pretrained(tmp_path / "merged")
    for folder in (tmp_path / "exported", tmp_path / "merged"):
        card = (folder / "README.md").read_text()
        assert "vllm serve path/or/repo --linear-backend humming\n" in card
        assert warning in card
        assert any(warning in note for note in verify(folder, engine=False).notes)
        assert {one.name: one.loads for one in inspect(folder).engines}["vLLM on a CPU"] is False


def test_models_that_transformers_decompresses(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """It loads them, and computes with float activations: that is said before training, and wherever one looks."""
    lost = "decompresses the model while loading, and then rounds no activations"
    with caplog.at_level(logging.INFO, logger="peft_lrqat"):
        model = get_peft_model(ARCHITECTURES["T5"].build(), LRQATConfig(group_size=-1, act_bits=8))
        assert lost in caplog.text
    with pytest.warns(
        UserWarning, match=f"transformers loads what `save_pretrained` writes of this model, but .*{lost}"
    ):
        merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert lost in (tmp_path / "README.md").read_text()
    assert any(lost in note for note in verify(tmp_path, engine=False).notes)


def test_a_card_names_no_engine_that_refuses(tmp_path: Path):
    model = adapted(tiny(num_hidden_layers=1), bits=4, group_size=8, kv_bits=8)
    export(model, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve" not in card
    assert "vLLM refuses the checkpoint" in card
