"""The integer grid: the one value on which ranges, tuners, merge, export and tests agree.

A weight matrix W of shape (out, in) is represented as

    W^ = s * (q - z),      q in [qmin, qmax],  qmin = -2^(bits-1),  qmax = 2^(bits-1) - 1

with one scale s (weight units per grid step) and one integer zero point z (grid steps, 0 where the grid is symmetric)
for each group of weights. q, the *code*, is always centred, as compressed-tensors writes it; `Q = q - z` is the signed
level that the LR-QAT paper (arXiv 2406.06385, eq. 1 and 8) writes, with bounds [-z', 2^bits - 1 - z'] and
z' = z + 2^(bits-1). Keeping codes centred means that one 8-bit fixed-point format, one packing and one clip serve both
kinds of grid.

A symmetric grid has one level more below zero than above. A scale may be negative: then that level lies above. Nothing
else changes: every formula with s holds as it is.

Scales have shape (rows, groups): (out, in / group_size) per group, (out, 1) per output channel, (1, 1) per tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch

from .arguments import check_flags

PER_CHANNEL = -1
PER_TENSOR = 0

#: `bits` of the ternary grid {-1, 0, 1}, as BitNet b1.58 writes it: log2(3).
TERNARY: Any = 1.58  # the one `bits` that is no int; Any, so that `bits` may be annotated as what it else is

#: What `scale_dtype` may be called; "auto" means: exact in both bf16 and fp16.
SCALE_DTYPES = ("auto", "bf16", "fp16", "fp32")

_SCALE_BOUNDS = {
    "auto": (2.0**-24, 65280.0),
    "bf16": (torch.finfo(torch.bfloat16).tiny, torch.finfo(torch.bfloat16).max),
    "fp16": (2.0**-24, 65504.0),
    "fp32": (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max),
}


def code_range(bits: int) -> tuple[int, int]:
    """Return qmin and qmax, the smallest and largest centred code of `bits` bits: -2^(bits-1) and 2^(bits-1) - 1."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


@dataclass(frozen=True)
class Grid:
    """A uniform integer grid: its width, and which weights share a scale.

    Args:
        bits (int | float): from 2 to 8, or 1.58 for the ternary grid.
        group_size (int): how many consecutive input features share a scale. -1: a whole output channel. 0: the whole
            tensor.
        symmetric (bool): False: every scale comes with an integer zero point.

    Raises:
        ValueError: a field is out of range.

    Examples:
        >>> from peft_lrqat import Grid
        >>> grid = Grid(bits=4, group_size=128)
        >>> grid.qmin, grid.qmax
        (-8, 7)
        >>> grid.scale_shape(out_features=4096, in_features=1024)
        (4096, 8)
        >>> print(grid.describe())
        4 bits, symmetric, groups of 128
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        whole = not isinstance(self.bits, bool) and isinstance(self.bits, int) and 2 <= self.bits <= 8
        if not whole and not (isinstance(self.bits, float) and self.bits == TERNARY):
            raise ValueError(f"`bits` is {self.bits!r}; it must be an integer from 2 to 8.")
        check_flags(symmetric=self.symmetric)
        if self.ternary and not self.symmetric:
            raise ValueError("`symmetric` is False, but the ternary grid (`bits=1.58`) is symmetric by definition.")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < PER_CHANNEL:
            raise ValueError(
                f"`group_size` is {self.group_size!r}; it must be a positive integer that divides in_features, "
                "-1 (one scale per output channel) or 0 (one scale per tensor)."
            )

    @property
    def ternary(self) -> bool:
        """Whether the codes are -1, 0 and 1."""
        return self.bits == TERNARY

    @property
    def code_bits(self) -> int:
        """Width of a packed code: `bits`, and 2 for the ternary grid."""
        return 2 if self.ternary else int(self.bits)

    @property
    def qmin(self) -> int:
        """Smallest code, in grid steps."""
        return -1 if self.ternary else code_range(self.code_bits)[0]

    @property
    def qmax(self) -> int:
        """Largest code, in grid steps."""
        return code_range(self.code_bits)[1]

    def check_divides(self, in_features: int, where: str = "the weight", common: int | None = None) -> None:
        """Raise ValueError if `group_size` does not divide `in_features`, naming what would.

        Args:
            common: the largest number that divides the input features of all weights that are to have this grid. Sizes
                that divide it are named, so that none of these is refused next. Default: those of this weight.
        """
        if self.group_size > 0 and in_features % self.group_size:
            fitting = [g for g in (256, 128, 96, 64, 48, 32, 24, 16, 8, 4, 2) if (common or in_features) % g == 0]
            hint = f"one of {fitting} or " if fitting else ""
            raise ValueError(
                f"`group_size` is {self.group_size}, which does not divide the {in_features} input features of "
                f"{where}. Use {hint}-1 (per output channel), or leave this module out with `exclude_modules`."
            )

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Return the shape (rows, groups) of the scales of an (out, in) weight."""
        if self.group_size == PER_TENSOR:
            return (1, 1)
        if self.group_size == PER_CHANNEL:
            return (out_features, 1)
        return (out_features, in_features // self.group_size)

    def describe(self) -> str:
        """Describe it in a few words for people: "4 bits, symmetric, groups of 128"."""
        share = {PER_CHANNEL: "per channel", PER_TENSOR: "per tensor"}.get(
            self.group_size, f"groups of {self.group_size}"
        )
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"ternary, {share}" if self.ternary else f"{self.bits} bits, {kind}, {share}"


@dataclass(frozen=True)
class GridTensor:
    """A quantized weight: the one form from which every checkpoint is written.

    Attributes:
        codes: int8 (out, in), in [grid.qmin, grid.qmax].
        scale: fp32 (rows, groups), weight units per grid step, exactly as trained, not zero; rows is out, or 1 per
            tensor.
        zero_point: int8 (rows, groups) in grid steps, None if the grid is symmetric.
        grid: what they lie on.
        input_scale: fp32 (1,), the fixed scale of the layer's input (`Activations.static`); None: it has none.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    grid: Grid
    input_scale: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Compute the weights: (out, in) in `dtype`, rounded once."""
        return dequantize(self.codes, self.scale, self.zero_point, dtype)


def grouped(matrix: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """View an (out, in) matrix as (out, groups, in / groups), so that `scale[:, :, None]` broadcasts against it."""
    return matrix.view(matrix.shape[0], scale.shape[1], -1)


def join_rows(tensors: Sequence[GridTensor]) -> GridTensor:
    """Weights on one grid as one weight: the rows of each behind those of the one before, each row with its scales."""

    def joined(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([p.expand(t.codes.shape[0], -1) for p, t in zip(parts, tensors, strict=True)])

    zeros = [t.zero_point for t in tensors if t.zero_point is not None]
    codes, scale = torch.cat([t.codes for t in tensors]), joined([t.scale for t in tensors])
    return GridTensor(codes, scale, joined(zeros) if zeros else None, tensors[0].grid)


@overload
def rows_of(per_row: torch.Tensor, rows: slice) -> torch.Tensor: ...
@overload
def rows_of(per_row: None, rows: slice) -> None: ...
def rows_of(per_row: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """Select the scales, or zero points, of some rows of a weight: a view.

    Args:
        per_row: (out, groups); (1, groups) serves all rows, and comes back whole; None (no zero points) stays None.
        rows: of the weight.
    """
    return per_row if per_row is None or per_row.shape[0] == 1 else per_row[rows]


def sum_per_scale(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Add up what belongs to the weights that share a scale.

    Args:
        values: (out, n), where n is a multiple of the groups, or already `grouped`.
        scale: (rows, groups); rows is out, or 1 where all rows share.

    Returns:
        (rows, groups), in the dtype of `values`. To add up a weight chunk by chunk:
        `rows_of(total, rows).add_(sum_per_scale(values, rows_of(scale, rows)))`, from zeros.
    """
    sums = values if values.shape == (values.shape[0], scale.shape[1]) else grouped(values, scale).sum(dim=-1)
    return sums.sum(dim=0, keepdim=True) if scale.shape[0] == 1 < sums.shape[0] else sums


def quantize(weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    """Round a weight to its nearest codes (ties to even).

    Args:
        weight: (out, in), weight units, any float dtype.
        scale: (rows, groups), fp32, weight units per grid step.
        zero_point: (rows, groups) integers in grid steps, or None.

    Returns:
        int8 (out, in) codes in [qmin, qmax].
    """
    levels = grouped(weight.float(), scale) / scale.unsqueeze(-1)
    codes = levels.round_()
    if zero_point is not None:
        codes += zero_point.unsqueeze(-1)
    return codes.clamp_(grid.qmin, grid.qmax).to(torch.int8).view_as(weight)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Compute `s * (q - z)` in `dtype`, rounded once, exactly as compressed-tensors decompresses.

    Args:
        codes: (out, in) codes, any dtype that holds them.
        scale: (rows, groups), fp32.
        zero_point: (rows, groups) integers, or None.

    Returns:
        (out, in) weights in `dtype`.
    """
    levels = grouped(codes.float(), scale)
    if zero_point is not None:
        levels = levels - zero_point.unsqueeze(-1)
    return (levels * scale.unsqueeze(-1)).view_as(codes).to(dtype)


def scale_bounds(scale_dtype: str) -> tuple[float, float]:
    """Return the smallest and the largest magnitude of a stored scale; ValueError: no such `scale_dtype`."""
    if scale_dtype not in _SCALE_BOUNDS:
        raise ValueError(f"`scale_dtype` is {scale_dtype!r}; allowed are {SCALE_DTYPES}.")
    return _SCALE_BOUNDS[scale_dtype]


def scales_out_of_range(scale: torch.Tensor, start: torch.Tensor, scale_dtype: str) -> torch.Tensor:
    """Tell where trained scales have left what a checkpoint stores, so that the forward holds them at an end: bool.

    Args:
        scale: fp32, as trained, not snapped; NaN is out of range, and so is what has changed its sign.
        start: the same shape, what it was before training. Weights that are all zero start at the smallest scale:
            there a smaller one, above 0, is no loss.
    """
    smallest, largest = scale_bounds(scale_dtype)
    scale, start = torch.where(start < 0, -scale, scale), start.abs()
    return ~(scale <= largest) | ~((scale >= smallest) | (start <= smallest)) | (scale <= 0)


def snap_scale(scale: torch.Tensor, scale_dtype: str) -> torch.Tensor:
    """Round a scale to the nearest one of its sign (0: positive) that a checkpoint stores exactly (design principle 1).

    See `snap_magnitude`. Idempotent: `snap(snap(s)) == snap(s)`.
    """
    return with_sign_of(scale, snap_magnitude(scale.abs(), scale_dtype))


def with_sign_of(scale: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Give magnitudes the signs of scales of the same shape; 0 counts as positive."""
    return torch.where(scale < 0, -magnitude, magnitude)


def snap_magnitude(scale: torch.Tensor, scale_dtype: str) -> torch.Tensor:
    """Round to the nearest positive scale that a checkpoint stores exactly.

    "auto" gives numbers that are exact in bf16 *and* fp16: 8 significant bits, and multiples of 2^-24 below 2^-17 where
    fp16 runs out of exponent. One checkpoint is then exact whatever dtype an engine computes in.

    Args:
        scale: any shape, fp32, weight units per grid step; what is not positive becomes the smallest.
        scale_dtype: one of `SCALE_DTYPES`.

    Returns:
        fp32 tensor of the same shape. NaN stays NaN.

    Raises:
        ValueError: there is no such `scale_dtype`.
    """
    smallest, largest = scale_bounds(scale_dtype)
    if scale_dtype == "fp32":
        return scale.clamp(min=smallest)
    if scale_dtype == "bf16":
        return scale.clamp(min=smallest).to(torch.bfloat16).float()
    scale = scale.clamp(smallest, largest)
    if scale_dtype == "fp16":
        return scale.to(torch.float16).float()
    return torch.where(scale < 2.0**-17, (scale * 2.0**24).round() * 2.0**-24, scale.to(torch.bfloat16).float())
