"""The commands. Exit codes: 0 done and equal, 1 a comparison failed, 2 the user's input cannot be used."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from transformers.utils import logging

from ..checkpoint import export as exporting
from ..checkpoint.inspect import inspect as inspect_folder
from ..checkpoint.verify import verify as verify_folder
from ..formats import FORMATS
from . import show

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
_errors = Console(stderr=True)

_Trusted = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python files that define the model, if it brings some.")
]


@contextlib.contextmanager
def _user_errors(say: Callable[[str], str] = show.one_line) -> Iterator[None]:
    """What the user can repair is told in a sentence, not in a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        _errors.print(f"error: {say(str(error))}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """transformers' own progress bars and remarks would break up what a command prints."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a merged or exported checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    format: Annotated[
        str, typer.Option("--format", "-f", help=f"One of: {', '.join(FORMATS)}.")
    ] = "compressed-tensors",
    container_bits: Annotated[int | None, typer.Option(help="Width of the stored codes; wider is still exact.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of a tokenizer. Default: the source's.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 5GB.")] = "5GB",
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="The format's own, NAME=VALUE.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is not empty.")] = False,
    allow_inexact: Annotated[bool, typer.Option("--allow-inexact", help="Write even if values change.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only say whether it is possible, and why not.")] = False,
    trust_remote_code: _Trusted = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Write a trained model in the format of an engine, from its integers and scales."""
    with _user_errors(show.printable):  # reasons, layer by layer
        own = _options(option or [])
        if check:
            verdict = exporting.can_export(
                source,
                format,
                container_bits=container_bits,
                allow_inexact=allow_inexact,
                trust_remote_code=trust_remote_code,
                **own,
            )
            print(show.printable(str(verdict)))
            raise typer.Exit(0 if verdict else 1)
        report = exporting.export(
            source,
            out,
            format,
            tokenizer=tokenizer,
            container_bits=container_bits,
            overwrite=overwrite,
            allow_inexact=allow_inexact,
            max_shard_size=max_shard_size,
            progress=not quiet,
            trust_remote_code=trust_remote_code,
            **own,
        )
        print(show.printable(str(report)))


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A checkpoint, or an adapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the histogram of codes into this file (.png, .svg).")] = None,
    trust_remote_code: _Trusted = False,
) -> None:
    """Show grid, container, size, exactness of the scales, the codes' histogram, and which engines load it."""
    with _user_errors():
        with _quietly():
            found = inspect_folder(folder, trust_remote_code=trust_remote_code)
        if plot is not None:
            show.plot(found, plot)
        if as_json:
            print(json.dumps(found.as_dict(), indent=2))
        else:
            show.inspection(found, Console())


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint.")],
    against: Annotated[Path | None, typer.Option(help="What it was made from: an adapter or a checkpoint.")] = None,
    engine: Annotated[bool, typer.Option(help="Load it with transformers and compare layers and logits.")] = True,
    trust_remote_code: _Trusted = False,
) -> None:
    """Compare a checkpoint with its source, file by file and as transformers loads it. Exit code 1: not equal.

    No other engine is run.
    """
    with _user_errors():
        if against is None and not engine:
            raise ValueError("There is nothing to compare: name --against, or leave out --no-engine.")
        with _quietly(), _errors.status("reading") as status:
            found = verify_folder(
                folder,
                against,
                engine=engine,
                trust_remote_code=trust_remote_code,
                progress=lambda what: status.update(what),
            )
        show.verification(found, Console())
        if not found.findings:
            why = found.skipped or f"loading this format needs {' and '.join(found.missing)}. Install it"
            raise ValueError(f"nothing was compared: {why}, or name --against to compare the files.")
        raise typer.Exit(0 if found else 1)


def _options(pairs: list[str]) -> dict[str, Any]:
    parsed = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--option {pair!r} must be NAME=VALUE.")
        with contextlib.suppress(json.JSONDecodeError):  # numbers, true, null; anything else is a string
            value = json.loads(value)
        parsed[name.replace("-", "_")] = value
    return parsed
