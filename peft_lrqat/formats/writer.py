"""What a writer of a format offers, what it is told, and what it reports.

A format's writer is a subclass of `Writer`, named in `FORMATS` (`formats/__init__.py`).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..arguments import nearest
from ..grid import GridTensor
from .source import Source


@dataclass(frozen=True)
class Problem:
    """Why something cannot be written (exactly).

    Attributes:
        layer: module name, or None if it is about the model.
        reason: what does not fit, with the numbers.
        suggestion: what to do: another format, or another choice at training time.
        inexact: whether `allow_inexact=True` writes it all the same, with a loss.
    """

    layer: str | None
    reason: str
    suggestion: str
    inexact: bool = False


@dataclass(frozen=True)
class Settings:
    """What every writer is told.

    Attributes:
        container_bits: width of the stored codes; None: what training chose, or the narrowest that the format has.
        allow_inexact: write even where a value changes, and measure the loss.
        max_shard_size: bytes of a file, where a format has several.
        tokenizer: a tokenizer, the folder of one, or None.
        options: the format's own, an instance of the writer's `Options`.
    """

    container_bits: int | None = None
    allow_inexact: bool = False
    max_shard_size: int = 5 * 10**9
    tokenizer: Any = None
    options: Any = None


@dataclass
class Written:
    """What a writer did, for the report.

    Attributes:
        layer_bytes: size of everything that belongs to quantized weights, scales included.
        weights: number of quantized weights in it.
        dense: modules on a grid that the format has no packed form of; their weights are floats on the grid.
        container: a few words: "pack-quantized, 4 bits".
        loss: how far stored weights are from trained ones.
        notes: what else a user should know.
    """

    layer_bytes: int = 0
    weights: int = 0
    dense: list[str] = field(default_factory=list)
    container: str = ""
    loss: Loss | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Loss:
    """Sums over the weights of layers that could not be stored exactly."""

    layers: int = 0
    squared_error: float = 0.0
    squared_weight: float = 0.0
    largest: float = 0.0  # relative to the scale: in grid steps

    @property
    def relative(self) -> float:
        """|W_stored - W| / |W|, Frobenius norms, over those layers."""
        return (self.squared_error / self.squared_weight) ** 0.5 if self.squared_weight else 0.0

    def add(self, trained: GridTensor, stored: GridTensor) -> None:
        """Count a layer whose scales (or codes) changed."""
        W, stored_W = trained.dequantize(torch.float32), stored.dequantize(torch.float32)
        self.layers += 1
        self.squared_error += float((stored_W.double() - W.double()).square().sum())
        self.squared_weight += float(W.double().square().sum())
        self.largest = max(self.largest, float((stored_W - W).abs().max() / trained.scale.abs().min()))

    def __str__(self) -> str:
        return f"{self.layers} layers, relative error of their weights {self.relative:.2e}"


class Writer(ABC):
    """One format.

    Attributes:
        name: as in `FORMATS`.
        needs: import names of packages that may be missing.
        Options: a dataclass of the format's own options; its fields' metadata have "help".
        tokenizer_files: whether `export` puts the tokenizer's files beside the checkpoint; if not, the writer saves it.
        usage: Markdown for the model card: how to load the result.
        in_vllm: whether vLLM serves the format.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    tokenizer_files: ClassVar[bool] = True
    usage: ClassVar[str] = ""
    in_vllm: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Options:
        """No options."""

    @abstractmethod
    def problems(self, source: Source, settings: Settings) -> list[Problem]:
        """Everything that stands in the way, found from shapes, grids and scales; empty if the export is exact.

        Codes are read only where nothing else tells. `write` does not raise for any of these afterwards.
        """

    @abstractmethod
    def write(self, source: Source, folder: Path, settings: Settings, progress: Callable[[str], None]) -> Written:
        """Write the checkpoint into an existing, empty folder.

        Args:
            progress: called with a module's name when that layer is done.

        Raises:
            ValueError: a value cannot be stored exactly, and `settings.allow_inexact` is False.
        """


def make_options(writer: Writer, options: dict[str, Any], others: Iterable[str] = ()) -> Any:
    """The format's options from keywords.

    Args:
        others: what else the caller takes by name, of which an option may be a typing error.

    Raises:
        ValueError: the format has no such option, or refuses its value.
    """
    known = [f.name for f in dataclasses.fields(writer.Options)]
    for name in options:
        if name not in known:
            if near := nearest(name, [*known, *others]):
                raise ValueError(f"The format {writer.name!r} has no option {name!r}. Did you mean `{near}`?")
            has = f"its options are {', '.join(known)}" if known else "it has no options of its own"
            raise ValueError(f"The format {writer.name!r} has no option {name!r}; {has}.")
    return writer.Options(**options)
