"""The commands, as functions of what was typed. Each returns its exit code: 0 done and equal, 1 not.

`run` makes a sentence and an exit code of everything that is raised.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils import logging

from .. import autoload as autoloading
from ..checkpoint import export as exporting
from ..checkpoint.hub import fetched
from ..checkpoint.inspect import inspect as inspect_folder
from ..checkpoint.merge import merge as merge_adapter
from ..checkpoint.verify import verify as verify_folder
from ..installing import how_to_install
from . import show
from .flags import flags

NOT_EQUAL, UNUSABLE, FAULT, INTERRUPTED, NOBODY_READS = 1, 2, 3, 130, 141


def run(command: str, arguments: dict[str, Any]) -> int:
    """Carry out a command; returns its exit code.

    Args:
        command: the name of a function below.
        arguments: its own.
    """
    try:
        code = _COMMANDS[command](**arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe has seen enough, as `head` does
        with contextlib.suppress(OSError):  # for what Python flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except (ValueError, OSError, ImportError) as error:  # what the user can repair
        # reasons of an export stand layer by layer; whatever else has several lines is another package's
        say = show.printable if command == "export" else show.one_line
        show.error(flags(say(str(error) or type(error).__name__)))
        return UNUSABLE
    except KeyboardInterrupt:
        show.error("interrupted")
        return INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        show.error(f"{type(error).__name__}, which is a fault of peft-lrqat. Please report what is printed above")
        return FAULT


def export(
    source: str,
    out: str,
    format: str,
    container_bits: int | None,
    option: list[str] | None,
    tokenizer: str | None,
    max_shard_size: str,
    overwrite: bool,
    allow_inexact: bool,
    check: bool,
    trust_remote_code: bool,
    quiet: bool,
) -> int:
    """Write a trained model in another format, or say whether that is possible."""
    own = _options(option or [])
    with _quietly(bars=not quiet):
        if check:
            verdict = exporting.can_export(
                source,
                format,
                container_bits=container_bits,
                allow_inexact=allow_inexact,
                trust_remote_code=trust_remote_code,
                **own,
            )
            print(flags(show.printable(str(verdict))))
            return 0 if verdict else NOT_EQUAL
        report = exporting.export(
            source,
            out,
            format,
            tokenizer=tokenizer,
            container_bits=container_bits,
            overwrite=overwrite,
            allow_inexact=allow_inexact,
            max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
            **own,
        )
    print(flags(show.printable(str(report))))
    return 0


def merge(
    adapter: str,
    out: str,
    tokenizer: str | None,
    max_shard_size: str,
    overwrite: bool,
    trust_remote_code: bool,
    quiet: bool,
) -> int:
    """Merge an adapter into its base model, and save what comes out."""
    with _quietly(bars=not quiet):
        report = merge_adapter(
            adapter,
            out,
            tokenizer=tokenizer,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
    print(flags(show.printable(str(report))))
    return 0


def inspect(source: str, as_json: bool, plot: Path | None, trust_remote_code: bool) -> int:
    """Show what a checkpoint or an adapter holds."""
    if plot is not None and not plot.parent.is_dir():
        raise ValueError(f"--plot {plot}: there is no folder {str(plot.parent)!r}. Make it first, or name another.")
    with _quietly(bars=True):
        place = fetched(source)
    with _quietly(bars=False):
        found = inspect_folder(place, trust_remote_code=trust_remote_code)
    if plot is not None:
        show.plot(found, plot)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        show.inspection(found)
    return 0


def verify(checkpoint: str, against: str | None, engine: bool, as_json: bool, trust_remote_code: bool) -> int:
    """Compare a checkpoint with its source, and with what transformers makes of it."""
    if against is None and not engine:
        raise ValueError("There is nothing to compare: name --against, or leave out --no-engine.")
    with _quietly(bars=True):
        place, source = fetched(checkpoint), None if against is None else fetched(against)
    with _quietly(bars=False), show.status("reading") as status:
        found = verify_folder(place, source, engine=engine, trust_remote_code=trust_remote_code, progress=status)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        show.verification(found)
    if not found.findings:
        why = found.skipped
        if found.missing:
            why = f"loading this format needs {' and '.join(found.missing)}: {how_to_install(*found.missing)}"
        raise ValueError(f"nothing was compared: {why}. Or name --against to compare the files.")
    return 0 if found else NOT_EQUAL


def autoload(action: str, directory: str | None) -> int:
    """Switch the autoload of an environment on or off, or say which it is."""
    return autoloading.act(action, directory)


_COMMANDS: dict[str, Callable[..., int]] = {f.__name__: f for f in (export, merge, inspect, verify, autoload)}


def _options(pairs: list[str]) -> dict[str, Any]:
    parsed = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--option {pair!r} must be NAME=VALUE.")
        with contextlib.suppress(json.JSONDecodeError):  # numbers, true, null; anything else is a string
            value = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        parsed[name.replace("-", "_")] = value
    return parsed


@contextlib.contextmanager
def _quietly(bars: bool) -> Iterator[None]:
    """Let other packages say nothing, and warnings of this one be lines.

    Args:
        bars: whether progress bars, of whatever package, are shown. They are on terminals only.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), contextlib.nullcontext() if bars and sys.stderr.isatty() else _no_bars():
            warnings.showwarning = show.warning  # type: ignore[assignment]  # it takes what is passed on, and more
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Show no progress bar. compressed-tensors has no switch for its own; but everybody's are tqdm's."""
    own: Any = tqdm.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = init
    try:
        yield
    finally:
        tqdm.__init__ = own
