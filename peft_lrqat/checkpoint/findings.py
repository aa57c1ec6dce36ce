"""What the commands find and say: results, apart from what produces them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import bytes_in_words
from ..formats.writer import Loss, Problem
from .engines import Engine


@dataclass(frozen=True)
class Check:
    """What `can_export` found. It is true if the export would be exact, or lossy where that is allowed.

    Printed, it gives the problems, the layers that have them, and what helps.

    Attributes:
        format (str): the format that was asked about.
        problems (tuple[Problem, ...]): everything in the way, each with `layer`, `reason`, `suggestion` and `inexact`.
            Those with `inexact` are not in the way if `allow_inexact` is True.
        allow_inexact (bool): as given to `can_export`.
    """

    format: str
    problems: tuple[Problem, ...]
    allow_inexact: bool = False

    @property
    def blocking(self) -> tuple[Problem, ...]:
        """The problems that stop the export."""
        return tuple(p for p in self.problems if not (p.inexact and self.allow_inexact))

    def __bool__(self) -> bool:
        return not self.blocking

    def __str__(self) -> str:
        if not self.problems:
            return f"{self.format}: exact."
        alike: dict[tuple[str, str], list[str]] = {}
        for problem in self.blocking or self.problems:
            alike.setdefault((problem.reason, problem.suggestion), []).extend([problem.layer] if problem.layer else [])
        lines = [f"{self.format}: " + ("not possible." if self.blocking else "possible with a loss.")]
        for (reason, suggestion), layers in alike.items():
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            where = f"{layers[0]}{more}: " if layers else ""
            lines.append(f"  {where}{reason}. What helps: {suggestion}.")
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """What `export` wrote. Printed, it is a few lines for people.

    Attributes:
        format (str): the format.
        folder (Path): where it was written.
        container (str): a few words, such as "pack-quantized, 4 bits".
        grid (str): a few words on the trained grid.
        layers (int): number of quantized layers.
        weights (int): number of their weights.
        layer_bytes (int): bytes of these weights, scales included.
        total_bytes (int): bytes of all files.
        dense (tuple[str, ...]): modules on a grid whose weights the format holds as floats.
        loss (Loss | None): how far the stored weights are from the trained ones. None: every value is as trained.
        notes (tuple[str, ...]): what else to know.
        inexact (tuple[str, ...]): what `allow_inexact` let pass and no weight shows: inputs that are rounded otherwise.
    """

    format: str
    folder: Path
    container: str
    grid: str
    layers: int
    weights: int
    layer_bytes: int
    total_bytes: int
    dense: tuple[str, ...] = ()
    loss: Loss | None = None
    notes: tuple[str, ...] = ()
    inexact: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Bits a quantized weight takes in the files, scales included."""
        return 8 * self.layer_bytes / self.weights if self.weights else 0.0

    def __str__(self) -> str:
        lost = [*([str(self.loss)] if self.loss else []), *self.inexact]
        lines = [
            f"{self.folder}: {self.format} ({self.container}), {self.layers} layers on the grid {self.grid}, "
            f"{self.bits_per_weight:.2f} bits a weight, {bytes_in_words(self.total_bytes)}",
            f"NOT exact: {'; '.join(lost)}" if lost else "exact: codes and scales are the trained ones",
        ]
        if self.dense:
            lines.append(f"as floats on the grid: {', '.join(self.dense[:3])}" + " ..." * (len(self.dense) > 3))
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        folder, format: of the checkpoint; the format of an adapter's folder is "adapter".
        grid: what was trained, in words; `bits`, `group_size`, `symmetric` in numbers.
        act_bits: of rounded activations, the fewest of any layer; None: all are floats.
        container_bits: width of the stored codes.
        kv_cache: how keys and values are rounded, in words; None: they are not.
        layers, weights: how many are quantized.
        layer_bytes, total_bytes: of the quantized weights with their scales, and of all tensors; None for an adapter.
        scales: how many there are.
        inexact_scales: dtype -> how many of them it cannot hold exactly.
        scale_dtype: what they were trained to be exact in, None if unknown.
        histogram: code -> how many weights have it.
        engines: which load it.
    """

    folder: str
    format: str
    grid: str
    bits: float
    group_size: int
    symmetric: bool
    act_bits: int | None
    kv_cache: str | None
    container_bits: int
    layers: int
    weights: int
    layer_bytes: int | None
    total_bytes: int | None
    scales: int
    inexact_scales: dict[str, int]
    scale_dtype: str | None
    recipe: str | None
    histogram: dict[int, int]
    engines: list[Engine]

    @property
    def bits_per_weight(self) -> float | None:
        """Bits a quantized weight takes in the files, scales included; None for an adapter."""
        return None if self.layer_bytes is None else 8 * self.layer_bytes / self.weights

    @property
    def entropy(self) -> float:
        """Bits a code, as information: what a perfect packing of the codes would take."""
        shares = [count / self.weights for count in self.histogram.values() if count]
        return -sum(share * math.log2(share) for share in shares)

    def as_dict(self) -> dict[str, Any]:
        """All fields and figures, as JSON can hold them."""
        return {**asdict(self), "bits_per_weight": self.bits_per_weight, "entropy": self.entropy}


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        what: what was compared.
        equal: whether it passed.
        detail: the numbers.
    """

    what: str
    equal: bool
    detail: str


@dataclass
class Verification:
    """What `verify` found; true if every comparison passed.

    Attributes:
        checkpoint, against: what was compared with what, in words.
        engine: what loaded the checkpoint: transformers, with what it needs for the format (no other engine is run).
            None if something is missing, or it was not to be loaded.
        missing: packages that were not found.
        skipped: why transformers is not compared, whatever is installed, or nothing. Not a comparison that passed.
        notes: what engines that are not run here do otherwise, and how to start them.
    """

    checkpoint: str = ""
    against: str = ""
    engine: str | None = None
    missing: list[str] = field(default_factory=list)
    skipped: str = ""
    notes: tuple[str, ...] = ()
    findings: list[Finding] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.findings) and all(finding.equal for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `equal` is whether something was compared and all of it passed."""
        return {**asdict(self), "equal": bool(self)}
