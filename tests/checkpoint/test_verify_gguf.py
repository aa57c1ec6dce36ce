"""`verify` and `inspect` on GGUF files."""

from __future__ import annotations

import pytest
import torch

from peft_lrqat import export
from peft_lrqat.checkpoint.verify import verify
from tests.grids import adapted_for_gguf
from tests.models import adapted, tiny


@pytest.mark.parametrize("options", [{}, {"embedding_type": "q8_0"}, {"type": "f32"}], ids=str)
def test_a_file_is_equal_to_its_source(options, tmp_path):
    model = adapted_for_gguf()
    export(model, tmp_path / "out", format="gguf", vocabulary=False, progress=False, **options)
    found = verify(tmp_path / "out", model)
    assert found
    assert found.checkpoint.endswith(".gguf (gguf)")
    assert found.against == "the PeftModelForCausalLM in memory"
    assert [finding.what for finding in found.findings] == [
        "levels (codes less zero points) and scales", "other tensors", "the engine's weights"
    ]  # fmt: skip


def test_another_adapter_is_told_apart(tmp_path):
    export(adapted_for_gguf(), tmp_path / "out", format="gguf", vocabulary=False, progress=False)
    found = verify(tmp_path / "out", adapted_for_gguf())
    assert [finding.equal for finding in found.findings] == [False, True, False]


def test_a_changed_norm_is_noticed(tmp_path):
    model = adapted_for_gguf()
    export(model, tmp_path / "out", format="gguf", vocabulary=False, progress=False)
    with torch.no_grad():
        model.base_model.model.model.norm.weight[3] += 1
    found = verify(tmp_path / "out", model, engine=False)
    assert [finding.equal for finding in found.findings] == [True, False]
    assert "norm" in found.findings[1].detail


def test_a_type_that_transformers_does_not_know_is_compared_all_the_same(tmp_path):
    model = adapted_for_gguf(bits=2, group_size=-1, target_modules=["q_proj"])
    report = export(model, tmp_path / "out", format="gguf", vocabulary=False, progress=False)
    assert "Q2_0" in report.container
    found = verify(tmp_path / "out", model)
    assert found
    assert "cannot load" in found.skipped
    assert found.engine is None
    assert [finding.what for finding in found.findings] == [
        "levels (codes less zero points) and scales", "other tensors"
    ]  # fmt: skip


def test_the_source_and_the_same_architecture_are_needed(tmp_path):
    export(adapted_for_gguf(), tmp_path / "out", format="gguf", vocabulary=False, progress=False)
    with pytest.raises(ValueError, match="against"):
        verify(tmp_path / "out")
    with pytest.raises(ValueError, match=r"'llama'.*'qwen2'"):
        verify(tmp_path / "out", adapted(tiny("qwen2")))
