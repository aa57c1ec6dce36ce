"""The command `peft-lrqat`: export, inspect, verify."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Entry point."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        sys.exit(f"peft-lrqat's commands need more packages: pip install {names}, or peft-lrqat with its extra 'cli'.")
    from .app import app

    app()
