"""How the commands' findings look: in a terminal, in a pipe or a file, and as a picture.

Only a terminal gets colours. Lines are never wrapped or cut, so that they can be searched.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..checkpoint.inspect import Inspection
from ..checkpoint.verify import Verification
from ..files import bytes_in_words
from ..installing import how_to_install
from .flags import flags

_BAR = 40  # characters
_ROWS = 24  # a grid with more codes is drawn in bins


def printable(text: str) -> str:
    """`text` without what a terminal would obey, or could not show: names in a file are a stranger's."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def one_line(text: str, longest: int = 1000) -> str:
    """The same on one line, with its end left out if that is long."""
    line = " ".join(printable(text).split())
    return line if len(line) <= longest else line[:longest] + " ..."


def _print(text: str, *, err: bool = False, **styles: Any) -> None:
    """Print a line with rich's markup, unwrapped. What the stream cannot encode is escaped."""
    stream = sys.stderr if err else sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    Console(file=stream, soft_wrap=True, highlight=False, emoji=False).print(text, **styles)


def error(text: str) -> None:
    """Say on stderr why a command stopped."""
    _print(f"error: {text}", err=True, style="red", markup=False)


def warning(message: Warning | str, category: type[Warning], *args: Any) -> None:
    """Say a warning on stderr in a line: a replacement of `warnings.showwarning`. Deprecations are not for users."""
    if not issubclass(category, FutureWarning | DeprecationWarning | PendingDeprecationWarning):
        _print(f"warning: {flags(one_line(str(message)))}", err=True, style="yellow", markup=False)


@contextlib.contextmanager
def status(first: str) -> Iterator[Callable[[str], None]]:
    """On a terminal, a line on stderr that says what is being done, and is gone at the end."""
    console = Console(stderr=True)
    with console.status(first) if console.is_terminal else contextlib.nullcontext() as shown:
        yield shown.update if shown is not None else lambda what: None


def inspection(found: Inspection) -> None:
    """Print what `inspect` found."""
    facts = _facts(found)
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        _print(f"[bold]{name:<{width}}[/] {escape(printable(value))}")
    _print("\n[bold]codes[/]")
    bins = _bins(found.histogram)
    largest = max(count for _, count in bins) or 1
    block = "\u2588" if sys.stdout.isatty() else "#"
    for label, count in bins:
        bar = block * round(_BAR * count / largest)
        _print(f"{label:>10} {bar:<{_BAR}} {count / found.weights:7.2%}")
    _print("\n[bold]engines[/]")
    for engine in found.engines:
        mark = "[green]yes[/]" if engine.loads else "[red]no [/]"
        source = "" if engine.run else " (read in its source, not run)"
        _print(f"  {mark} {engine.name}{': ' + escape(flags(engine.why)) if engine.why else ''}{source}")


def _facts(found: Inspection) -> list[tuple[str, str]]:
    size = "not merged yet"
    if found.layer_bytes is not None and found.total_bytes is not None:
        size = (
            f"{found.bits_per_weight:.2f} bits a weight with scales "
            f"({bytes_in_words(found.layer_bytes, found.total_bytes)}), {bytes_in_words(found.total_bytes)} in all"
        )
    exact = [dtype for dtype, count in found.inexact_scales.items() if not count]
    scales = f"{found.scales:,}, exact in {' and '.join(exact) or 'neither float16 nor bfloat16'}"
    for dtype, count in found.inexact_scales.items():
        scales += f"; {count:,} change in {dtype}" if count else ""
    activations = f", {found.act_bits}-bit activations" if found.act_bits else ""
    facts = [
        ("format", f"{found.format}, {found.container_bits}-bit container{activations}"),
        ("grid", found.grid),
        ("layers", f"{found.layers}, {found.weights:,} weights"),
        ("size", size),
        ("scales", scales),
        ("entropy", f"{found.entropy:.2f} bits a code"),
    ]
    if found.kv_cache:
        facts.insert(2, ("KV cache", found.kv_cache))
    return [*facts, ("recipe", found.recipe)] if found.recipe else facts


def _bins(histogram: dict[int, int]) -> list[tuple[str, int]]:
    codes = sorted(histogram)
    width = -(-len(codes) // _ROWS)
    bins = []
    for i in range(0, len(codes), width):
        part = codes[i : i + width]
        label = str(part[0]) if width == 1 else f"{part[0]}..{part[-1]}"
        bins.append((label, sum(histogram[code] for code in part)))
    return bins


def plot(found: Inspection, path: Path) -> None:
    """Draw the histogram of codes into a file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib knows no such kind of file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError(f"--plot needs matplotlib: {how_to_install('matplotlib')}.") from missing
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    shares = [100 * count / found.weights for count in found.histogram.values()]
    axes.bar(list(found.histogram), shares, width=0.9, color="tab:blue")
    axes.set_xlabel("code")
    axes.set_ylabel("% of the weights")
    axes.set_title(f"{Path(found.folder).resolve().name}: {found.grid}", fontsize=10)
    try:
        figure.savefig(os.fspath(path), dpi=150)
    except ValueError as error:
        raise ValueError(f"--plot {path}: {error}. Take .png or .svg.") from None


def verification(found: Verification) -> None:
    """Print what `verify` found."""
    for name, value in (
        ("checkpoint", found.checkpoint),
        ("compared with", found.against),
        ("loaded with", found.engine or "nothing"),
    ):
        _print(f"{name}: {printable(value)}", markup=False)
    if found.missing:
        _print(f"not installed: {', '.join(found.missing)}: {how_to_install(*found.missing)}", markup=False)
    if found.skipped:
        _print(f"not compared: {one_line(found.skipped)}", markup=False)
    for finding in found.findings:
        mark = "[green]equal    [/]" if finding.equal else "[red]NOT EQUAL[/]"
        _print(f"{mark} {finding.what}: {escape(one_line(finding.detail))}")
    for note in found.notes:
        _print(f"note: {note}", markup=False)
