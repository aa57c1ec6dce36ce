"""Where things are: imports point down, no file waits for itself, and every file has its test in the mirrored place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "peft_lrqat"

# Top to bottom. A floor knows those below it; what lies on one floor may import one another, but for siblings.
FLOORS = (
    ("peft_lrqat",),
    ("cli",),
    ("autoload", "calibration", "distillation", "graphs", "monitor"),
    ("tuners", "tuners.lrqat", "tuners.lowbit_sr"),
    ("tuners.common",),
    ("checkpoint",),
    ("modules",),
    ("formats",),
    ("ops",),
    (
        "arguments",
        "grid",
        "lattice",
        "packing",
        "ranges",
        "range_search",
        "rounding",
        "chunks",
        "files",
        "installing",
        "peft_hooks",
        "read_only",
        "registration",
        "_version",
    ),
)
SIBLINGS = ("tuners.lrqat", "tuners.lowbit_sr")

# Files without a test file of their own, and why. A listed file that gets its test, or goes, leaves this list; it does
# not grow: a new file comes with its test.
WITHOUT_TEST = {
    "one constant": ("_version",),
    "a few lines, behind everything that is made of them": ("chunks", "registration"),
    "all kernels beside their references, in tests/ops/kernels": ("ops.kernels.tiles",),
    "parts of the operations that tests/ops compares with autograd": (
        "ops.dispatch",
        "ops.reference_experts",
    ),
    "all formats at all grids, in tests/formats/test_formats.py and test_reading.py": (
        "formats.source",
        "formats.usage",
    ),
    "whole files, in tests/formats/gguf/test_writer.py": (
        "formats.gguf.architectures",
        "formats.gguf.contents",
        "formats.gguf.floats",
        "formats.gguf.spool",
        "formats.gguf.tensors",
    ),
    "merged models and their folders, in tests/checkpoint": ("checkpoint.verify",),
    "what a method does has a file each (saving, wrapping, refusing), not what it is made of": (
        "tuners.common.config",
        "tuners.common.frozen",
        "tuners.common.model",
        "tuners.common.preflight",
        "tuners.lowbit_sr.config",
        "tuners.lowbit_sr.dropped",
        "tuners.lowbit_sr.layer",
        "tuners.lowbit_sr.model",
        "tuners.lowbit_sr.parts",
        "tuners.lrqat.config",
        "tuners.lrqat.layer",
        "tuners.lrqat.model",
        "tuners.lrqat.optim",
        "tuners.lrqat.quantized_base",
    ),
    "in tests/calibration/test_preprocess.py": ("calibration.calibrate",),
    "in tests/cli/test_commands.py": ("cli.show",),
}


class Import(NamedTuple):
    """One imported module of the package, and where that is written."""

    module: str
    line: int


def modules(folder: Path) -> dict[str, Path]:
    """The modules under `folder`, by dotted name from its parent; a package has the name of its folder."""
    return {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(folder.rglob("*.py"))
    }


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    """What the module `name` imports of `known`: anywhere in the file, in functions and under TYPE_CHECKING too.

    `from package import thing` counts as the module `thing` where there is one, and as the package otherwise.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            submodules = [f"{origin}.{alias.name}" for alias in node.names]
            wanted = [submodule if submodule in known else origin for submodule in submodules]
        else:
            continue
        yield from (Import(module, node.lineno) for module in dict.fromkeys(wanted) if module in known)


FILES = modules(ROOT / PACKAGE)
GRAPH = {name: list(imports(name, path, FILES)) for name, path in FILES.items()}


def floor(name: str) -> int:
    """The number of the floor on which a module lies, counted from the top."""
    inside = name.removeprefix(f"{PACKAGE}.")
    on = [(len(part), i) for i, parts in enumerate(FLOORS) for part in parts if _within(inside, part)]
    assert on, f"{name} lies on no floor: name it in FLOORS"
    return max(on)[1]


def sibling(name: str) -> str | None:
    """Which of SIBLINGS a module belongs to."""
    return next((part for part in SIBLINGS if _within(name.removeprefix(f"{PACKAGE}."), part)), None)


def circles(graph: dict[str, list[Import]]) -> list[list[str]]:
    """The strongly connected components of more than one module, and modules that import themselves."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = {i.module for i in graph[waiting.pop()]} - found
            found |= new
            waiting += new
        reached[start] = found
    components = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph}
    return sorted(sorted(component) for component in components if component)


def test_imports_point_down():
    upward = [
        f"{FILES[name].relative_to(ROOT)}:{line} imports {module}, which lies above it"
        for name, found in GRAPH.items()
        for module, line in found
        if floor(module) < floor(name)
    ]
    assert not upward, "\n" + "\n".join(upward)


def test_siblings_do_not_know_each_other():
    across = [
        f"{FILES[name].relative_to(ROOT)}:{line} imports its sibling's {module}"
        for name, found in GRAPH.items()
        for module, line in found
        if sibling(name) and sibling(module) and sibling(name) != sibling(module)
    ]
    assert not across, "\n" + "\n".join(across)


def test_no_file_waits_for_itself():
    found = circles(GRAPH)
    assert not found, "\n" + "\n".join(f"circle of {len(circle)}: {', '.join(circle)}" for circle in found)


def test_every_file_has_its_test():
    """`ops/linear.py` is tested in `tests/ops/test_linear.py`; what an `__init__` exports, by all tests beside it."""
    excused = {name: reason for reason, names in WITHOUT_TEST.items() for name in names}
    wrong = []
    for name, path in FILES.items():
        if path.name == "__init__.py":
            continue
        inside = name.removeprefix(f"{PACKAGE}.")
        test = Path("tests", *inside.split(".")[:-1], f"test_{path.stem}.py")
        reason = excused.pop(inside, None)
        if reason is None and not (ROOT / test).exists():
            wrong.append(f"{path.relative_to(ROOT)} has no {test}")
        elif reason is not None and (ROOT / test).exists():
            wrong.append(f"{inside} has its test now ({test}): take it out of WITHOUT_TEST")
    wrong += [f"{inside} is gone: take it out of WITHOUT_TEST" for inside in excused]
    assert not wrong, "\n" + "\n".join(wrong)


def test_tests_do_not_import_tests():
    """What two test files share is a helper, `tests/*.py`, or a fixture of a conftest."""
    known = modules(ROOT / "tests")
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for name, path in known.items()
        for module, line in imports(name, path, known)
        if module.rpartition(".")[2].startswith("test_")
    ]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("from ..grid import Grid", "grid"),
        ("from .. import grid", "grid"),
        ("from ..ops import quantized_linear", "ops"),
        ("from . import reference", "ops.reference"),
        ("from .reference import linear_forward", "ops.reference"),
        ("import peft_lrqat.grid as g", "grid"),
        ("from peft_lrqat.grid import Grid", "grid"),
        ("from peft_lrqat import grid", "grid"),
        ("from peft_lrqat import Grid", ""),
        ("def f():\n    from ..grid import Grid", "grid"),
        ("if TYPE_CHECKING:\n    from ..grid import Grid", "grid"),
        ("import torch", None),
        ("from torch import ops", None),
    ],
)
def test_every_way_to_import_is_seen(tmp_path: Path, line: str, module: str | None):
    names = ("", "grid", "ops", "ops.reference", "ops.linear")
    known = {f"{PACKAGE}.{name}".rstrip("."): tmp_path for name in names}
    path = tmp_path / "linear.py"
    path.write_text(line)
    found = [i.module for i in imports(f"{PACKAGE}.ops.linear", path, known)]
    assert found == ([] if module is None else [f"{PACKAGE}.{module}".rstrip(".")])


def test_a_circle_is_found():
    graph = {"a": [Import("b", 1)], "b": [Import("c", 1)], "c": [Import("b", 1)], "d": [Import("a", 1)]}
    assert circles(graph) == [["b", "c"]]
    assert circles({"a": [Import("a", 1)]}) == [["a"]]
    assert circles({"a": [Import("b", 1)], "b": []}) == []


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")
