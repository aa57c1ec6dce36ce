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
which replace those on all rows; a name alone, `=null` and `=false` want a field that is false, null or not there. What
is not there leaves its cell empty.

Where the results are no list of runs, or a cell is one run's and the next cell another's, each column says the file and
the place in it, and how the number is printed:

    <!-- figures
    | grid | before | now |
    |---|---:|---:|
    | conversion_before: range_ns/{} as .0f | conversion: range_ns/{} as .0f |
    4 bits, groups of 32 = 4 bits, symmetric, groups of 32, signed
    -->

`{}` is what a row says behind its first column (`{1}`, `{2}`: what it says behind the first and the second semicolon).
A place `runs/[bits=4 lean]` is the one run of a list that meets the conditions, `runs/0` the first. A number may be
multiplied (`as * 1000 .0f`), or compared with one (`as % of FILE: PLACE`). `min` or `max` behind makes the smallest or
the largest of a column bold. What is not there leaves its cell empty; a row or a column of nothing is an error.

`<!-- counted: 7B -->` has the bytes of a training step's parts, which `counted.py` counts without a run.

What accuracy.py measured has tables of its own, of accuracy_*.json: `<!-- accuracy: all -->` has every row, and
`<!-- accuracy: best SmolLM2 -->` the best of each method, for models whose name begins so (none: for all).
`<!-- accuracy: activations X.json ... -->` has some files' rows by how they round activations and the KV cache.
`<!-- pretrain: X.json ... -->` has the rows of `pretrain.py table`.
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
_COUNTED = re.compile(r"(<!-- counted: ([^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
_FIGURES = re.compile(r"(<!-- figures\n(.*?)\n-->\n).*?(<!-- end -->)", re.DOTALL)
_PRETRAIN = re.compile(r"(<!-- pretrain: ([^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
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
    return all(_absent(at(run, key)) == _absent(value) for key, value in wanted.items())


def _absent(value: Any) -> Any:
    """The value, and None for what says no; 0 is a number."""
    return None if value is False or value == "" else value


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


def figure(place: str) -> Any:
    """What stands at `FILE: PLACE`; None: nothing.

    Raises:
        ValueError: several runs meet the conditions in a place.
    """
    file, _, path = place.partition(":")
    data = json.loads((ROOT / "benchmarks" / "results" / f"{file.strip()}.json").read_text(encoding="utf-8"))
    for part in path.strip().split("/"):
        if part.startswith("["):
            found = [run for run in data if meets(run, conditions(part.strip("[]")))]
            if len(found) > 1:
                raise ValueError(f"{len(found)} runs of {file}.json meet the conditions of {part}; it must be one.")
            data = found[0] if found else None
        elif isinstance(data, list):
            data = data[int(part)]
        else:
            data = data.get(part) if isinstance(data, dict) else None
    return data


def figures(spec: str) -> str:
    """The table that a comment describes whose columns have places of their own.

    Raises:
        ValueError: as `figure`, or a row or a column has no figure.
    """
    head, line, columns, *rows = (part.strip() for part in spec.strip().splitlines())
    keys = [[word.strip() for word in row.partition(" = ")[2].split(";")] for row in rows]
    places = [column.strip() for column in columns.strip("|").split("|")]
    filled = [_column(place, keys) for place in places]
    lines = []
    for row, *found in zip(rows, *filled, strict=True):
        if not any(found):
            raise ValueError(f"The row {row!r} has no figure.")
        lines.append(f"| {row.partition(' = ')[0]} | {' | '.join(found)} |")
    for place, column in zip(places, filled, strict=True):
        if not any(column):
            raise ValueError(f"The column {place!r} has no figure.")
    return "\n".join([head, line, *lines]).replace("|  |", "| |").replace("|  |", "| |") + "\n"


def _column(column: str, keys: list[list[str]]) -> list[str]:
    """The cells of a column of `figures`, for rows of these keys."""
    place, _, form = column.partition(" as ")
    bold = form.rpartition(" ")[2] if form.endswith((" min", " max")) else ""
    form = form.removesuffix(f" {bold}") if bold else form
    values = [figure(_filled(place, words)) for words in keys]
    if form.startswith("% of "):
        others = [figure(_filled(form.removeprefix("% of "), words)) for words in keys]
        pairs = zip(values, others, strict=True)
        values = [None if value in (None, other) else 100 * (value / other - 1) for value, other in pairs]
        form = "+.1f"
        texts = ["" if value is None else f"{value:{form}} %" for value in values]
    else:
        times, _, form = form.rpartition(" ")
        factor = float(times.removeprefix("*")) if times else 1
        numbers = [value * factor if times and value is not None else value for value in values]
        texts = ["" if value is None else format(value, form) for value in numbers]
    best = {"min": min, "max": max}[bold](value for value in values if value is not None) if bold else None
    return [f"**{text}**" if bold and value == best else text for text, value in zip(texts, values, strict=True)]


def _filled(place: str, words: list[str]) -> str:
    place = place.replace("{}", words[0])
    return re.sub(r"\{(\d)\}", lambda found: words[int(found[1])] if int(found[1]) < len(words) else "", place)


def accuracy(spec: str) -> str:
    """The tables that a comment about accuracy.py's results describes."""
    from accuracy_report import activation_rows, all_rows, best_rows

    files = [str(path) for path in sorted(ROOT.glob("benchmarks/results/accuracy_*.json"))]
    kind, _, name = spec.partition(" ")
    if kind == "activations":
        return activation_rows(_results(name))
    return all_rows(files) if kind == "all" else best_rows(files, name=name)


def pretrain(files: str) -> str:
    """Write the table of training from scratch."""
    from pretrain import table_rows

    return table_rows(_results(files)) + "\n"


def _results(names: str) -> list[str]:
    return [str(ROOT / "benchmarks" / "results" / name) for name in names.split()]


def counted(name: str) -> str:
    """The table that counted.py makes."""
    from counted import table

    return table(name, figure)


def made(text: str) -> str:
    """A page with its tables made anew."""
    text = _COUNTED.sub(lambda found: found[1] + counted(found[2]) + found[3], text)
    text = _TABLE.sub(lambda found: found[1] + table(found[2]) + found[3], text)
    text = _FIGURES.sub(lambda found: found[1] + figures(found[2]) + found[3], text)
    text = _PRETRAIN.sub(lambda found: found[1] + pretrain(found[2]) + found[3], text)
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
