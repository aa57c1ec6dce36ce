"""Which of ggml's types hold a layer exactly, and the layer's bytes in the one that is chosen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ...chunks import row_chunks
from ...grid import Grid, GridTensor
from .blocks import BLOCK_TYPES, BlockType
from .contents import Contents, NotExact


@dataclass(frozen=True)
class Fit:
    """Whether a type suits a grid, as far as shapes tell.

    Attributes:
        problem: why it cannot, or None.
        certain: if False, the values decide: scales of a kind, or zero points, that not every layer has.
    """

    problem: str | None
    certain: bool = True


def fit(kind: BlockType, grid: Grid, in_features: int) -> Fit:
    """Whether `kind` can hold a layer of this grid with rows of `in_features` weights."""
    name = kind.name.upper()
    if in_features % kind.size:
        return Fit(f"{in_features} input features do not divide into {name} blocks of {kind.size}")
    group = grid.group_size if grid.group_size > 0 else in_features
    if group % kind.part:
        return Fit(f"groups of {group} do not divide into {name} blocks' runs of {kind.part} weights with one scale")
    if grid.qmax - grid.qmin > kind.highest - kind.lowest:
        return Fit(f"{name} holds {kind.highest - kind.lowest + 1} levels, too few for {grid.describe()}")
    span = grid.qmax - grid.qmin
    low, high = (grid.qmin, grid.qmax) if grid.symmetric else (-span, span)
    turned = kind.mirrored and low >= -kind.highest and high <= -kind.lowest
    certain = kind.offset or turned or (low >= kind.lowest and high <= kind.highest)
    if grid.symmetric and not certain:
        return Fit(f"{name} holds the levels {kind.lowest} to {kind.highest}, not {low} to {high}")
    if kind.size > kind.part and group % kind.size:
        certain = False  # several scales in a block: only if they are multiples of one number
    if kind.offset and kind.size == kind.part and not grid.symmetric:
        certain = False  # the offset times the scale must be exact in fp16
    return Fit(None, certain)


def candidates(grid: Grid, in_features: int) -> list[BlockType]:
    """The types that may hold the layer, smallest first."""
    fitting = [kind for kind in BLOCK_TYPES.values() if fit(kind, grid, in_features).problem is None]
    return sorted(fitting, key=lambda kind: kind.bits_per_weight)  # stable: of two alike, the one listed first


def contents(tensor: GridTensor, kind: BlockType) -> Contents:
    """What the blocks of a layer, or of some of its rows, hold."""
    codes, scale, zero_point, grid = tensor.codes, tensor.scale, tensor.zero_point, tensor.grid
    rows, cols = codes.shape
    repeats = cols // scale.shape[1] // kind.part

    def by_part(values: torch.Tensor) -> torch.Tensor:
        return values.expand(rows, -1).repeat_interleave(repeats, 1).reshape(-1, kind.size // kind.part)

    zero = codes.new_zeros(1, scale.shape[1]) if zero_point is None else zero_point
    zeros = by_part(zero.to(torch.int16))
    levels = codes.to(torch.int16).reshape(-1, kind.size) - zeros.repeat_interleave(kind.part, 1)
    unit = -grid.qmin if grid.symmetric and not grid.ternary else 1
    return Contents(levels, by_part(scale.float()), grid.qmin - zeros, unit)


def rows_of(tensor: GridTensor, rows: slice | torch.Tensor) -> GridTensor:
    """Some rows of a layer, or all of them in another order."""
    own = rows if tensor.scale.shape[0] > 1 else slice(None)
    zero_point = None if tensor.zero_point is None else tensor.zero_point[own]
    return GridTensor(tensor.codes[rows], tensor.scale[own], zero_point, tensor.grid)


def to_blocks(tensor: GridTensor, kind: BlockType) -> torch.Tensor:
    """A layer as GGUF stores it: uint8 (out, in / kind.size * kind.bytes).

    Raises:
        NotExact: the type cannot hold it without changing a weight.
    """
    rows, cols = tensor.codes.shape
    problem = fit(kind, tensor.grid, cols).problem
    if problem:
        raise NotExact(problem)
    stored = torch.empty(rows, cols // kind.size * kind.bytes, dtype=torch.uint8)
    for part in row_chunks(rows, cols, tensor.codes.device):
        stored[part] = kind.pack(contents(rows_of(tensor, part), kind)).view(-1, stored.shape[1])
    return stored


def from_blocks(stored: torch.Tensor, kind: BlockType) -> tuple[torch.Tensor, torch.Tensor]:
    """What a GGUF tensor holds.

    Args:
        stored: uint8 (out, bytes).

    Returns:
        int16 (out, in) levels q - z, and fp32 (out, in / kind.part) scales.
    """
    rows = stored.shape[0]
    levels, scale = kind.unpack(stored.reshape(-1, kind.bytes))
    return levels.view(rows, -1), scale.reshape(rows, -1)


def holds(stored: torch.Tensor, kind: BlockType, tensor: GridTensor) -> bool:
    """Whether a GGUF tensor holds exactly the integers and scales of a layer."""
    rows, cols = tensor.codes.shape
    for part in row_chunks(rows, cols, tensor.codes.device):
        levels, scale = from_blocks(stored[part], kind)
        wanted = contents(rows_of(tensor, part), kind)
        if not torch.equal(scale.view_as(wanted.scale).abs(), wanted.scale.abs()):
            return False
        # types that may turn a block around do not keep the sign of its scale, but that of level x scale
        signs = (scale.view_as(wanted.scale) * wanted.scale).sign().to(levels.dtype).repeat_interleave(kind.part, 1)
        if not torch.equal(levels.view_as(wanted.levels) * signs, wanted.levels):
            return False
    return True


def smallest(parts: Iterable[GridTensor]) -> tuple[BlockType, list[torch.Tensor]]:
    """The smallest type that holds a layer exactly, or all matrices of a tensor; and the bytes of each (`to_blocks`).

    Args:
        parts: at least one matrix; gone through again for each type that is tried.

    Raises:
        NotExact: no type does.
    """
    first = next(iter(parts))
    grid, columns = first.grid, first.codes.shape[1]
    reasons = []
    for kind in candidates(grid, columns):
        try:
            return kind, [to_blocks(part, kind) for part in parts]
        except NotExact as reason:
            reasons.append(f"{kind.name}: {reason}")
    raise NotExact("; ".join(reasons) or f"no GGUF type holds {grid.describe()} with {columns} input features")
