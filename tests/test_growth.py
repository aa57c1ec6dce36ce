"""The exponents that benchmarks/growth.py finds are those of the law that the points follow."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

VALUES = [2.0, 4.0, 8.0, 16.0]


@pytest.fixture
def growth(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module("growth")


def test_exponents_of_a_law_with_a_constant_and_without(growth):
    assert growth.exponents(VALUES, [3 * x**1.5 for x in VALUES]) == pytest.approx({"slope": 1.5, "power": 1.5})
    with_constant = growth.exponents(VALUES, [100 + 3 * x**1.5 for x in VALUES])
    assert with_constant["power"] == pytest.approx(1.5)
    assert with_constant["slope"] < 1
    assert growth.exponents(VALUES, [5.0, 4.0, 3.0, 4.0])["power"] is None


def test_rows_have_both_ends_and_what_was_measured(growth):
    runs = [{"axis": "layers", "value": x, "method": "LoRA bf16", "seconds": 7 * x} for x in VALUES]
    (row,) = growth.growth(runs)
    assert row["seconds"] == pytest.approx({"first": 14, "last": 112, "slope": 1, "power": 1})
    assert (row["kind"], row["from"], row["to"]) == ("LoRA", 2, 16)
    assert "peak_gib" not in row  # a CPU has none
