"""The command `peft-lrqat`: what can be typed. What is then done, `peft_lrqat.cli` knows.

A module of its own, outside the package, because importing anything inside `peft_lrqat` imports torch and transformers,
which takes seconds: help, `--version` and a mistyped flag are answered without them.
"""

from __future__ import annotations

import contextlib
import logging
import runpy
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

_EXIT_CODES = """\b
Exit codes:
  0    done; what was compared is equal
  1    not equal (verify), not possible (export --check), not enabled (autoload status)
  2    the input cannot be used: stderr says why, and what to do
  3    an error of peft-lrqat, with its traceback
  130  interrupted
"""

# plain help, in a terminal and elsewhere: no boxes to wrap and cut what is looked for
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120, "help_option_names": ["-h", "--help"]},
    epilog=_EXIT_CODES,
)

_PLACE = "a folder, or on the Hub: OWNER/NAME[@REVISION][/SUBFOLDER]"
_Out = Annotated[str, typer.Argument(metavar="OUT", help="Folder to write. It appears when it is complete.")]
_Tokenizer = Annotated[
    str | None, typer.Option(metavar="PLACE", help="Where a tokenizer is, to save with it. Default: the source's.")
]
_ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Largest file, such as 5GB.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is not empty.")]
_Trusted = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python files that define the model, if it brings some.")
]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Entry point of the command."""
    app(prog_name="peft-lrqat")


def _print_versions(wanted: bool) -> None:
    if not wanted:
        return
    # the package's own is read from its file: metadata of an editable installation may be of another day
    own = runpy.run_path(str(Path(__file__).with_name("peft_lrqat") / "_version.py"))["__version__"]
    print(f"peft-lrqat {own}")
    with contextlib.suppress(metadata.PackageNotFoundError):
        others = [f"{name} {metadata.version(name)}" for name in ("peft", "transformers", "torch")]
        print(f"with {', '.join(others)}, Python {sys.version.split()[0]}")
    raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", help="Show versions, and exit.", is_eager=True, callback=_print_versions)
    ] = False,
) -> None:
    """Merge, export, inspect and compare models that were trained on a grid (LR-QAT, low-bit SR)."""


@app.command(short_help="Write a trained model in the format of an engine.")
def export(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help=f"An adapter, or a merged or exported checkpoint: {_PLACE}.")
    ],
    out: _Out,
    format: Annotated[
        Literal["compressed-tensors", "gptq", "bitnet", "torchao", "gguf"],
        typer.Option("--format", "-f", help="What to write."),
    ] = "compressed-tensors",
    container_bits: Annotated[
        int | None, typer.Option(metavar="N", help="Width of the stored codes, 2 to 8; wider is still exact.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="An option of the format's own.")
    ] = None,
    tokenizer: _Tokenizer = None,
    max_shard_size: _ShardSize = "5GB",
    overwrite: _Overwrite = False,
    allow_inexact: Annotated[
        bool, typer.Option("--allow-inexact", help="Write even if values change, and say by how much.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; say whether it is possible, and why not (exit code 1).")
    ] = False,
    trust_remote_code: _Trusted = False,
    quiet: _Quiet = False,
) -> None:
    """Write a trained model in the format of an engine, from its integers and scales."""
    _do("export", locals())


@app.command(short_help="Merge an adapter, and save the quantized checkpoint.")
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help=f"An adapter: {_PLACE}.")],
    out: _Out,
    tokenizer: _Tokenizer = None,
    max_shard_size: _ShardSize = "5GB",
    overwrite: _Overwrite = False,
    trust_remote_code: _Trusted = False,
    quiet: _Quiet = False,
) -> None:
    """Merge an adapter into its base model, as merge_and_unload() does, and save the quantized checkpoint."""
    _do("merge", locals())


@app.command(short_help="Show what a checkpoint holds, and which engines load it.")
def inspect(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help=f"A checkpoint, a GGUF file or an adapter: {_PLACE}.")
    ],
    as_json: _Json = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the histogram of codes into this file (.png, .svg).")
    ] = None,
    trust_remote_code: _Trusted = False,
) -> None:
    """Show grid, container, size, exactness of the scales, the codes' histogram, and which engines load it."""
    _do("inspect", locals())


@app.command(short_help="Compare a checkpoint with its source.")
def verify(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help=f"A checkpoint or a GGUF file: {_PLACE}.")],
    against: Annotated[
        str | None, typer.Option(metavar="PLACE", help="What it was made from: an adapter or a checkpoint, likewise.")
    ] = None,
    engine: Annotated[bool, typer.Option(help="Load it with transformers and compare layers and logits.")] = True,
    as_json: _Json = False,
    trust_remote_code: _Trusted = False,
) -> None:
    """Compare a checkpoint with its source, and with what transformers makes of it. Exit code 1: not equal.

    No other engine is run.
    """
    _do("verify", locals())


@app.command(short_help="Let PEFT know LR-QAT without an import.")
def autoload(
    action: Annotated[Literal["enable", "disable", "status"], typer.Argument(help="status: exit code 1 if not.")],
    directory: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="A site directory other than this environment's site-packages."),
    ] = None,
) -> None:
    """Let PEFT know LR-QAT in every process of this environment, without an import of peft_lrqat."""
    _do("autoload", locals())


def _do(command: str, arguments: dict[str, Any]) -> None:
    """Carry a command out, and end with its exit code."""
    with _loading():
        from peft_lrqat.cli import commands
    raise typer.Exit(commands.run(command, arguments))


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """Say on a terminal that torch is being imported, and none of what other packages say while they are."""
    said = sys.stderr.isatty()
    if said:
        print("loading torch and transformers ...", end="\r", file=sys.stderr, flush=True)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        if said:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
