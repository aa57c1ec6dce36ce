"""The extras that messages name exist and install what was missing; the project's lists of versions agree."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from peft_lrqat import __version__, installing
from peft_lrqat.installing import EXTRAS, how_to_install

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = PROJECT["optional-dependencies"]


def names(requirements: list[str]) -> set[str]:
    """What a list of requirements names, as imported."""
    return {re.split(r"[\[<>=;# ]", line)[0].replace("-", "_") for line in requirements}


def test_what_to_type():
    assert how_to_install("gguf").startswith('`pip install ".[gguf]"` in a checkout of peft-lrqat')
    assert '(`pip install "peft-lrqat[gguf]"` from an index)' in how_to_install("gguf")
    assert how_to_install("optimum", "gptqmodel") == "`pip install optimum gptqmodel`"


def test_cards_name_the_index_when_the_package_is_there(monkeypatch):
    assert "pip" not in installing.where_from()
    assert installing.named() == f"peft-lrqat {__version__}"
    monkeypatch.setattr(installing, "ON_INDEX", True)
    assert installing.where_from() == "pip install peft-lrqat"
    assert "https://pypi.org/project/peft-lrqat/" in installing.named()
    assert how_to_install("gguf").startswith('`pip install "peft-lrqat[gguf]"` (')


@pytest.mark.parametrize("package", EXTRAS)
def test_the_extra_brings_the_package(package):
    assert package in names(OPTIONAL[EXTRAS[package]])


def test_what_is_imported_is_required():
    """Anything that the package imports, but for what only a GPU's torch brings, is a dependency or in an extra."""
    known = names(PROJECT["dependencies"]) | set(EXTRAS) | set(sys.stdlib_module_names) | {"peft_lrqat", "triton"}
    for path in [*(ROOT / "peft_lrqat").rglob("*.py"), *ROOT.glob("_peft_lrqat_*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found = [node.module]
            assert {name.partition(".")[0] for name in found} <= known, (path, found)


def test_lowest_versions_are_the_bounds():
    pinned = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = dict(line.split("==") for line in pinned if "==" in line and not line.startswith("#"))
    of_users = [line for extra, lines in OPTIONAL.items() if extra not in ("dev", "docs", "notebook") for line in lines]
    for line in [*PROJECT["dependencies"], *of_users]:
        if bound := re.match(r"([\w-]+)>=([\d.]+)", line):
            assert (lowest[bound[1]] + ".0.0").startswith(bound[2] + "."), line


def test_versions_agree():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is not None
    assert cited[1] == __version__
