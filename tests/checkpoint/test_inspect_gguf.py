"""`inspect` on GGUF files."""

from __future__ import annotations

from peft_lrqat import export
from peft_lrqat.checkpoint.inspect import inspect
from tests.grids import adapted_for_gguf


def test_inspect_counts_what_is_in_the_blocks(tmp_path):
    model = adapted_for_gguf(bits=3)
    report = export(model, tmp_path / "out", format="gguf", vocabulary=False, embedding_type="q8_0", progress=False)
    found = inspect(tmp_path / "out")
    assert found.format == "gguf (Q4_0: 7)"
    assert (found.bits, found.group_size, found.symmetric) == (3, 32, True)
    assert found.weights == report.weights
    assert found.bits_per_weight == report.bits_per_weight == 4.5
    assert set(found.histogram) == set(range(-4, 4))
    assert sum(found.histogram.values()) == found.weights
    assert found.inexact_scales == {"float16": 0, "bfloat16": 0}
