"""Processes that start quickly: forked from one that has imported what takes seconds, and nothing of this package."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

#: How `torch.multiprocessing` starts such processes.
FORKED = "forkserver"

_context = multiprocessing.get_context(FORKED)
_context.set_forkserver_preload(
    ["torch", "transformers.modeling_utils", "transformers.models.auto.modeling_auto", "compressed_tensors", "peft"]
)


class _Blocker:
    """An import hook by which there is no peft_lrqat."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "peft_lrqat":
            raise ModuleNotFoundError("peft_lrqat is blocked in this process", name=name)


def _run(code: str, args: tuple[str, ...], output: str, clean: bool) -> None:
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    assert not any(name.split(".")[0] == "peft_lrqat" for name in sys.modules)
    sys.argv = ["-c", *args]
    if clean:
        sys.meta_path.insert(0, _Blocker())
        try:
            import peft_lrqat  # noqa: F401
        except ModuleNotFoundError:
            pass
        else:
            sys.exit("the plugin is importable, so this process proves nothing")
    exec(compile(code, "<the test's code>", "exec"), {"__name__": "__main__", "sys": sys})


def run_clean(code: str, *args: str) -> str:
    """`run` in a process that cannot import peft_lrqat."""
    return run(code, *args, clean=True)


def run(code: str, *args: str, clean: bool = False) -> str:
    """Run Python code (`sys` is imported) in a process where peft_lrqat was not imported yet; returns its output.

    Args:
        clean: it cannot be imported.

    Raises:
        AssertionError: it failed; with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        process = _context.Process(target=_run, args=(textwrap.dedent(code), args, str(output), clean))
        process.start()
        process.join()
        printed = output.read_text(errors="replace") if output.exists() else ""
    assert process.exitcode == 0, f"exit code {process.exitcode}: {printed[-8000:]}"
    return printed
