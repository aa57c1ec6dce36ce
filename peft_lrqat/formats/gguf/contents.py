"""What goes into ggml's blocks, and the steps that several block types share.

Bits of several weights share a byte in *planes*: with `shape` (outer, count, inner), the `count` weights
(o, 0, i), (o, 1, i), ... share the byte (o, i), the first in its lowest bits.

Every step refuses what it would have to change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Planes = tuple[int, int, int]


class NotExact(ValueError):
    """The type cannot hold these integers and scales exactly; the message says why."""


@dataclass(frozen=True)
class Contents:
    """What n blocks hold.

    Attributes:
        levels: int16 (n, size), q - z.
        scale: fp32 (n, parts), weight units per level.
        low: int16 (n, parts), the lowest level that the grid allows there.
        unit: a divisor of every `low`, and a power of two; 2^(bits-1) for symmetric grids, else 1.
    """

    levels: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor
    unit: int = 1


def put(values: torch.Tensor, shape: Planes, bits: int) -> torch.Tensor:
    """Unsigned (n, outer * count * inner) to uint8 (n, outer * inner)."""
    outer, count, inner = shape
    planes = values.to(torch.uint8).view(-1, outer, count, inner)
    packed = planes[:, :, 0].clone()
    for i in range(1, count):
        packed |= planes[:, :, i] << (bits * i)
    return packed.reshape(-1, outer * inner)


def take(packed: torch.Tensor, shape: Planes, bits: int) -> torch.Tensor:
    """Inverse of `put`; int16 (n, outer * count * inner)."""
    outer, count, inner = shape
    mask = (1 << bits) - 1
    planes = [(packed.reshape(-1, outer, inner) >> (bits * i)) & mask for i in range(count)]
    return torch.stack(planes, 2).view(-1, outer * count * inner).to(torch.int16)


def half(values: torch.Tensor) -> torch.Tensor:
    """fp32 (n, 1) to the bytes of fp16, uint8 (n, 2)."""
    stored = values.to(torch.float16)
    if not torch.equal(stored.float(), values):
        wrong = values[stored.float() != values][0].item()
        raise NotExact(f"the number {wrong:.9g} is not exact in fp16, in which GGUF keeps scales")
    return stored.view(torch.uint8)


def read_half(stored: torch.Tensor) -> torch.Tensor:
    """uint8 (n, 2) to fp32 (n, 1)."""
    return stored.contiguous().view(torch.float16).float()


def within(values: torch.Tensor, lowest: int, highest: int, what: str = "levels") -> torch.Tensor:
    """`values`, or NotExact if one lies outside."""
    smallest, largest = (int(v) for v in torch.aminmax(values))
    if smallest < lowest or largest > highest:
        raise NotExact(f"{what} from {smallest} to {largest} do not fit between {lowest} and {highest}")
    return values


def only(scale: torch.Tensor) -> torch.Tensor:
    """The one scale of each block, (n, 1)."""
    if scale.shape[1] > 1 and not (scale == scale[:, :1]).all():
        raise NotExact("scales differ within a block")
    return scale[:, :1]


def multiples(scale: torch.Tensor, largest: int, signed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The d (n, 1) of greatest magnitude of which all scales of a block are multiples, and the multiples, int64
    (n, parts).

    d has the sign of the block's first scale, so multiples are positive where all scales have one sign.

    Args:
        signed: whether multiples may be negative.

    Raises:
        NotExact: a multiple would be above `largest` (or below its negative), or negative where it may not.
    """
    steps = scale.double() * 2.0**24  # fp16 numbers are multiples of 2^-24
    whole = steps.to(torch.int64)
    if not torch.equal(whole.double(), steps):
        raise NotExact("a scale is not exact in fp16, in which GGUF keeps scales")
    common = whole[:, :1].clone()
    for i in range(1, whole.shape[1]):
        common = torch.gcd(common, whole[:, i : i + 1])
    common *= whole[:, :1].sign()
    factors = whole // common
    if not signed and int(factors.min()) < 0:
        raise NotExact("the scales of a block of 256 weights have both signs, and their factors have none")
    if int(factors.abs().max()) > largest:
        raise NotExact(f"the scales of a block of 256 weights are not multiples, up to {largest}, of one fp16 number")
    return (common.double() * 2.0**-24).float(), factors


def unsigned(block: Contents, part: int, highest: int) -> torch.Tensor:
    """u = L - low, int16 (n, size)."""
    return within(block.levels - block.low.repeat_interleave(part, 1), 0, highest)
