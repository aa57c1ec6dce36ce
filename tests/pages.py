"""What pages take from code: `python -m tests.pages` writes it anew, and `tests/test_docs.py` compares."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path
from typing import Any

from tests import architectures

CLI = Path(__file__).resolve().parents[1] / "docs" / "reference" / "cli.md"


def cli() -> str:
    """The page of the command `peft-lrqat`, made of its help."""
    import typer

    from _peft_lrqat_cli import app

    root: Any = typer.main.get_command(app)
    codes = inspect.cleandoc(root.epilog.removeprefix("\b\n"))
    parts = [_HEAD, _text(root.help), f"```text\n{codes}\n```", *_options(root)]
    for name, command in root.commands.items():
        parts += _command(f"peft-lrqat {name}", command)
    return "\n\n".join(parts) + "\n"


_HEAD = """# The command `peft-lrqat`

<!-- made by python -m tests.pages -->"""


def _command(name: str, command: Any) -> list[str]:
    if hasattr(command, "commands"):
        parts = [f"## {name}", _text(command.help)]
        for below, sub in command.commands.items():
            parts += _command(f"{name} {below}", sub)
        return parts
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([name, *["[OPTIONS]"] * bool(_options(command)), *(_usage(a) for a in arguments)])
    parts = [f"## {name}", _text(command.help), f"```text\n{usage}\n```"]
    if arguments:
        hints = typing.get_type_hints(command.callback)
        rows = [f"| `{_metavar(a)}` | {_text(a.help or '')}{_choices(hints[a.name])} |" for a in arguments]
        parts.append("\n".join(["| argument | |", "|---|---|", *rows]))
    return parts + _options(command)


def _options(command: Any) -> list[str]:
    options = [p for p in command.params if p.param_type_name == "option" and not getattr(p, "hidden", False)]
    hints = typing.get_type_hints(command.callback) if command.callback else {}
    rows = [f"| {_names(o)} | {_default(o)} | {_text(o.help or '')}{_choices(hints.get(o.name))} |" for o in options]
    return ["\n".join(["| option | default | |", "|---|---|---|", *rows])] if rows else []


def _choices(hint: Any) -> str:
    if typing.get_origin(hint) is not typing.Literal:
        return ""
    return f" One of {', '.join(f'`{choice}`' for choice in typing.get_args(hint))}."


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
    if option.secondary_opts:
        return f"`{option.opts[0] if value else option.secondary_opts[0]}`"
    return "" if value is None or callable(value) or option.is_flag or value in ((), []) else f"`{value}`"


def _text(help: str) -> str:
    """A help text as a paragraph, in which nothing is markup."""
    return re.sub(r"([|[*<])", r"\\\1", re.sub(r"[ \n]+", " ", inspect.cleandoc(help))).strip()


if __name__ == "__main__":
    CLI.write_text(cli(), encoding="utf-8")
    architectures.PAGE.write_text(architectures.page(architectures.PAGE.read_text(encoding="utf-8")), encoding="utf-8")
