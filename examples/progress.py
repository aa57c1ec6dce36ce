"""Progress bars for the examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

console = Console()


def _bar() -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description:<34}"), *columns, console=console)


def track(items: Iterable, description: str) -> Iterator:
    """Iterate under a progress bar."""
    with _bar() as bar:
        yield from bar.track(items, description=description)


class ProgressCallback(TrainerCallback):
    """The Trainer's steps and loss as a progress bar."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = _bar()
        self.task = self.bar.add_task(f"training, {self.name}", total=state.max_steps)
        self.bar.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            description = f"training, {self.name}, loss {float(logs['loss']):.3f}"
            self.bar.update(self.task, completed=state.global_step, description=description)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.stop()
