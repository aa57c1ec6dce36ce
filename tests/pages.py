"""What pages take from code: `python -m tests.pages` writes it anew, and `tests/test_docs.py` compares."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from tests import architectures

CLI = Path(__file__).resolve().parents[1] / "docs" / "reference" / "cli.md"


def cli() -> str:
    """The page of the command `peft-lrqat`, made of its help."""
    import typer

    from peft_lrqat.cli.app import app

    root: Any = typer.main.get_command(app)
    parts = [_HEAD.format(about=_text(root.help))]
    for name, command in root.commands.items():
        parts += _command(f"peft-lrqat {name}", command)
    return "\n\n".join(parts) + "\n"


_HEAD = """# The command `peft-lrqat`

<!-- made by python -m tests.pages -->

{about}"""


def _command(name: str, command: Any) -> list[str]:
    if hasattr(command, "commands"):
        parts = [f"## {name}", _text(command.help)]
        for below, sub in command.commands.items():
            parts += _command(f"{name} {below}", sub)
        return parts
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not getattr(p, "hidden", False)]
    usage = " ".join([name, "[OPTIONS]"[: 9 if options else 0], *(_usage(a) for a in arguments)])
    parts = [f"## {name}", _text(command.help), f"```text\n{' '.join(usage.split())}\n```"]
    if arguments:
        rows = [f"| `{_metavar(a)}` | {_text(a.help or '')} |" for a in arguments]
        parts.append("\n".join(["| argument | |", "|---|---|", *rows]))
    if options:
        rows = [f"| {_names(o)} | {_default(o)} | {_text(o.help or '')} |" for o in options]
        parts.append("\n".join(["| option | default | |", "|---|---|---|", *rows]))
    return parts


def _usage(argument: Any) -> str:
    name = _metavar(argument) + ("..." if argument.nargs != 1 else "")
    return name if argument.required else f"[{name}]"


def _metavar(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


def _names(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    return names if option.is_flag else f"{names} {option.metavar or option.name.split('_')[-1].upper()}"


def _default(option: Any) -> str:
    value = option.default
    return "" if value is None or callable(value) or option.is_flag or value in ((), []) else f"`{value}`"


def _text(help: str) -> str:
    """A help text as a paragraph, without what is markup to a table."""
    return re.sub(r"[ \n]+", " ", inspect.cleandoc(help)).replace("|", "\\|").strip()


if __name__ == "__main__":
    CLI.write_text(cli(), encoding="utf-8")
    architectures.PAGE.write_text(architectures.page(architectures.PAGE.read_text(encoding="utf-8")), encoding="utf-8")
