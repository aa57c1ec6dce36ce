"""Tables of the documentation, made from the JSON of benchmarks/results.

    python benchmarks/tables.py            # writes them anew into README.md and docs/
    python benchmarks/tables.py --check    # says what they would change, and fails if anything

A page says in a comment what a table holds; the table is between that comment and `<!-- end -->`:

    <!-- table: gpu.json gpu_full.json; runs; size=7B lean autocast
    | method | commit | peak 4x1024, GiB |
    |---|---|---:|
    | commit | steps.4x1024.peak_gib .1f |
    PEFT LoRA = method="LoRA bf16"
    **packed**, 8-bit Adam = method="LR-QAT int4" lean=true
    -->

The first line has the files, the place of the list of runs in them, and the conditions on all rows; then come the head,
what stands in the columns but the first (a dotted place in the run and how the number is printed; `min`: the smallest
is bold), and the rows: what the first column says, and which run it is. Just one run must meet a row's conditions,
which replace those on all rows; a name alone wants a field that is false, null or not there. What is not there leaves
its cell empty.

What accuracy.py measured has tables of its own, of accuracy_*.json: `<!-- accuracy: all -->` has every row, and
`<!-- accuracy: best SmolLM2 -->` the best of each method, for models whose name begins so (none: for all).
`<!-- accuracy: activations X.json -->` has one file's rows by how they round activations and the KV cache.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
_ACCURACY = re.compile(r"(<!-- accuracy: ((?:all|best|activations)[^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
_TABLE = re.compile(r"(<!-- table: (.*?)\n-->\n).*?(<!-- end -->)", re.DOTALL)


def at(data: Any, place: str) -> Any:
    """What stands at a dotted place; None: nothing."""
    for key in place.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data


def conditions(text: str) -> dict[str, Any]:
    found = {}
    for word in shlex.split(text):
        key, _, value = word.partition("=")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value  # a word
    return found


def meets(run: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all((at(run, key) or False) == (value or False) for key, value in wanted.items())


def cells(runs: list[dict[str, Any]], column: str) -> list[str]:
    """One column."""
    place, *words = column.split()
    values = [at(run, place) for run in runs]
    numbers = [value for value in values if isinstance(value, (int, float))]
    form = next((word for word in words if word != "min"), "")
    texts = ["" if value is None else format(value, form) for value in values]
    if "min" in words:
        texts = [f"**{t}**" if v == min(numbers) else t for t, v in zip(texts, values, strict=True)]
    return texts


def table(spec: str) -> str:
    """The table that a comment describes.

    Raises:
        ValueError: a row is no run, or several.
    """
    first, head, line, columns, *rows = (part.strip() for part in spec.strip().splitlines())
    files, place, shared = (part.strip() for part in (first + ";").split(";")[:3])
    known: list[dict[str, Any]] = []
    for file in files.split():
        known += at(json.loads((ROOT / "benchmarks" / "results" / file).read_text(encoding="utf-8")), place)
    labels, runs = [], []
    for row in rows:
        label, _, wanted = row.partition(" = ")
        found = [run for run in known if meets(run, {**conditions(shared), **conditions(wanted)})]
        if len(found) != 1:
            raise ValueError(f"{len(found)} runs of {files} meet the conditions of the row {row!r}; it must be one.")
        labels.append(label)
        runs.append(found[0])
    filled = [cells(runs, column.strip()) for column in columns.strip("|").split("|")]
    lines = ["| " + " | ".join(row) + " |" for row in zip(labels, *filled, strict=True)]
    return "\n".join([head, line, *lines]).replace("|  |", "| |").replace("|  |", "| |") + "\n"


def accuracy(spec: str) -> str:
    """The tables that a comment about accuracy.py's results describes."""
    from accuracy_report import activation_rows, all_rows, best_rows

    files = [str(path) for path in sorted(ROOT.glob("benchmarks/results/accuracy_*.json"))]
    kind, _, name = spec.partition(" ")
    if kind == "activations":
        return activation_rows([str(ROOT / "benchmarks" / "results" / name)])
    return all_rows(files) if kind == "all" else best_rows(files, name=name)


def made(text: str) -> str:
    """A page with its tables made anew."""
    text = _TABLE.sub(lambda found: found[1] + table(found[2]) + found[3], text)
    return _ACCURACY.sub(lambda found: found[1] + accuracy(found[2]) + found[3], text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(arguments)
    changed = 0
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        if (new := made(old)) == old:
            continue
        changed += 1
        if args.check:
            name = str(page.relative_to(ROOT))
            sys.stdout.writelines(
                difflib.unified_diff(old.splitlines(True), new.splitlines(True), name, "from the JSON")
            )
        else:
            page.write_text(new, encoding="utf-8")
    return int(args.check and changed > 0)


if __name__ == "__main__":
    sys.exit(main())
