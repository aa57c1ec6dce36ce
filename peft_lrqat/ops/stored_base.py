"""How a frozen base is stored: in grid steps, downcast to fixed point, packed codes or raw float bits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..grid import Grid, GridTensor, code_range
from ..packing import pack, unpack

#: What a frozen base can be stored as: fixed point, packed codes, or floats (kept as raw bits).
DOWNCASTS = ("fx8", "int", "bf16", "fp16", "fp32")

_FLOAT_BITS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class BaseFormat(NamedTuple):
    """How to read a stored base: the grid's bits, in_features, and one of `DOWNCASTS`."""

    bits: int
    in_features: int
    downcast: str

    @property
    def qmin(self) -> int:
        """Smallest code, in grid steps (of two bits: -2, though the ternary grid does not use it)."""
        return code_range(self.bits)[0]

    @property
    def qmax(self) -> int:
        """Largest code, in grid steps."""
        return code_range(self.bits)[1]


def encode_base(levels: torch.Tensor, bits: int, downcast: str) -> torch.Tensor:
    """Store W0 / s0 + z, the weight in centred grid steps (LR-QAT eq. 6 and 7: the downcasting operator phi).

    fx8 is 8-bit fixed point with 8 - bits fraction bits. The stored integer n stands for the *middle* of its cell,
    (n + 1/2) / 2^(8-bits): no value lies on a rounding tie, so rounding the stored base gives the codes that rounding
    W0 gives (only a weight that itself lies on a tie goes up, not to even), and every backend agrees about them. (The
    paper stores cell edges: one weight in 2^(8-bits) then sits on a tie, and the smallest A B flips it.)

    Args:
        levels: (rows, in) fp32, centred grid steps. Overwritten.
        bits: of the grid, 2 to 8; below 8 for fx8, which needs a fraction bit.
        downcast: one of `DOWNCASTS`.

    Returns:
        An integer tensor (rows, words), so that no `.to(dtype)` ever changes it: int8 for fx8, packed int32 for int,
        int16 / int32 bit patterns for the float formats.
    """
    qmin, qmax = code_range(bits)
    if downcast == "fx8":
        return levels.clamp_(qmin, qmax).mul_(1 << (8 - bits)).floor_().to(torch.int8)
    if downcast == "int":
        return pack(levels.round_().clamp_(qmin, qmax).to(torch.int8), bits)
    return levels.to(_FLOAT_BITS[downcast]).view(torch.int32 if downcast == "fp32" else torch.int16)


def decode_base(base: torch.Tensor, fmt: BaseFormat) -> torch.Tensor:
    """Read what `encode_base` stored: fp32 (rows, in), centred grid steps, the caller's to overwrite."""
    if fmt.downcast == "fx8":
        step = 2.0 ** (fmt.bits - 8)
        return torch.add(torch.tensor(0.5 * step, dtype=torch.float32), base, alpha=step)  # one kernel
    if fmt.downcast == "int":
        return unpack(base, fmt.bits, fmt.in_features).float()
    # a copy even from fp32: callers round in place, and must not round the stored base
    return base.view(_FLOAT_BITS[fmt.downcast]).to(torch.float32, copy=True)


def to_eight_bits(
    numbers: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, grid: Grid
) -> GridTensor:
    """Take a base in fixed point (fx8) as an 8-bit weight of the same integers, which any checkpoint format holds.

    It is the base with its fraction, off by half a step of the 8-bit grid, because a number of fx8 stands for the
    middle of its cell.

    Args:
        numbers: int8 (out, in), as `encode_base` stores them.
        scale: fp32 (rows, groups), weight units per step of `grid`.
        zero_point: int8 (rows, groups), steps of `grid`, or None.
        grid: below 8 bits.
    """
    fraction = 8 - grid.code_bits
    wide = Grid(8, grid.group_size, grid.symmetric)
    return GridTensor(numbers, scale * 2.0**-fraction, None if zero_point is None else zero_point << fraction, wide)


def from_eight_bits(weight: GridTensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Take the codes of an 8-bit weight as a base in fixed point (fx8): the inverse of `to_eight_bits`.

    Returns:
        int8 (out, in), fp32 (rows, groups) and int8 (rows, groups) or None: the base, its scale and zero point.
    """
    fraction, zero_point = 8 - bits, weight.zero_point
    return weight.codes, weight.scale * 2.0**fraction, None if zero_point is None else zero_point >> fraction
