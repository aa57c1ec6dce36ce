"""Weights that reach the ends of their grid: 8-bit scales grow with them, and a warning tells of full grids.

"minmax" puts the largest weight of each scale on the outermost level, so that from scratch, where weights grow many
times over, a fixed scale would cap them. Every so many roundings the codes on the two outermost levels are counted.
Where there are more than a few, the scale doubles and the codes are halved:

    s' = 2 s        q' = floor(q / 2 + u)        u from the weight's stream (`rounding.py`)

An even code keeps its value. An odd one moves by one old step, up or down with equal chance. The doubled scale is as
exact in every format as the scale was. A weight of 8 bits has the bit to spare; coarser ones do not.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ...chunks import row_chunks
from ...grid import TERNARY, Grid, grouped, rows_of, sum_per_scale
from ...packing import pack, unpack
from ...rounding import random_words, uniform

#: Roundings from one look to the next.
EVERY = 64
#: A scale is doubled if more codes than this share of its own, and more than two, are at the ends.
SHARE = 1 / 128

#: Shares of codes at the ends above which it is said, by bits: half as much again as normal weights have in the default
#: range before training (4 and 3 bits: 8 % and 17 %); of ternary and 2-bit codes, most of which are at the ends, more.
FULL = {TERNARY: 0.85, 2: 0.6, 3: 0.25, 4: 0.125, 8: 0.02}
_SAMPLE = 64  # rows of a weight
_SAID = "_peft_lrqat_said_full"


def at_ends(packed: torch.Tensor, scale: torch.Tensor, grid: Grid, columns: int) -> torch.Tensor:
    """Count the codes on the two outermost levels: fp32, in the shape of `scale`.

    Args:
        packed: int32 (n, words).
        scale: fp32 (n or 1, groups).
        columns: in_features.
    """
    codes = unpack(packed, grid.code_bits, columns)
    return sum_per_scale(((codes == grid.qmin) | (codes == grid.qmax)).float(), scale)


def _members(weight: Any) -> int:
    """How many codes share a scale."""
    return weight.numel() // weight.scale.numel()


# -- growing


def grow(weight: Any) -> None:
    """Widen a `LowBitTensor` if its stream has come to a multiple of `EVERY`: for optimizers, after each step.

    The stream, which is saved with the weight, decides, so that a resumed run grows where the first would have. It is
    read from the device once; afterwards its versions tell that a step has counted it on by one, and nothing else has
    written to it.
    """
    if not weight.grows:
        return
    version = weight.stream._version
    known = weight.known_count
    count = known[0] + 1 if known and version - known[1] == _STEP else int(weight.stream[1])
    if count % EVERY == 0:
        widen(weight)
        count += 1
    weight.known_count = (count, weight.stream._version)


def _versions_of_a_step() -> int:
    stream = torch.zeros(2, dtype=torch.int64)
    before = stream._version
    stream[1].add_(1)
    return stream._version - before


_STEP = _versions_of_a_step()


@torch.no_grad()
def widen(weight: Any) -> None:
    """Double the scales of a `LowBitTensor` that have too many codes at the ends of the grid, in place; counts as a
    rounding.

    Never waits for the device.
    """
    grid, columns = weight.grid, weight.shape[1]
    counts = torch.zeros_like(weight.scale)
    for rows in row_chunks(weight.shape[0], columns, weight.device):
        rows_of(counts, rows).add_(at_ends(weight.packed[rows], rows_of(weight.scale, rows), grid, columns))
    grows = counts > max(2, SHARE * _members(weight))
    for rows in row_chunks(weight.shape[0], columns, weight.device):
        codes = unpack(weight.packed[rows], grid.code_bits, columns).float()
        number = torch.arange(rows.start, rows.stop, device=weight.device)
        u = uniform(random_words(number, columns, weight.stream[1], weight.stream[0]))
        halved = grouped(torch.floor(codes / 2 + u), weight.scale)
        kept = torch.where(rows_of(grows, rows).unsqueeze(-1), halved, grouped(codes, weight.scale))
        weight.packed[rows] = pack(kept.reshape_as(codes).to(torch.int8), grid.code_bits)
    weight.scale.copy_(torch.where(grows, 2 * weight.scale, weight.scale))
    weight.stream[1].add_(1)


# -- saying it


@torch.no_grad()
def warn_of_full_grids(model: nn.Module) -> None:
    """Warn, once for a model, if many codes of the trained weights lie at the ends of their grid.

    Looks at some rows of every weight, and waits for the device once.
    """
    weights: list[Any] = [p for p in model.parameters() if p.requires_grad and hasattr(p, "known_count")]
    weights = [weight for weight in weights if not weight.is_meta]
    if not weights or getattr(weights[0], _SAID, False):
        return
    found = []
    for weight in weights:
        some = slice(0, _SAMPLE)
        scale = rows_of(weight.scale, some)
        counts = at_ends(weight.packed[some], scale, weight.grid, weight.shape[1])
        share = counts.sum() / (min(_SAMPLE, weight.shape[0]) * weight.shape[1])
        found.append((share * (weight.stream[1] > 0)).to(weights[0].device))  # of untrained ones, nothing
    share = float(torch.stack(found).mean())
    bits = weights[0].grid.bits
    own = sum(1 / _members(weight) for weight in weights) / len(weights)  # "minmax" puts one of each scale there
    if share <= FULL[bits] + 2 * own:
        return
    setattr(weights[0], _SAID, True)
    name = "ternary" if bits == TERNARY else f"{bits}-bit"
    remedy = {8: "`grow_scales=True`, or with ", TERNARY: "`learn_scales=True`, or with "}.get(bits, "")
    warnings.warn(
        f"{100 * share:.0f} % of the {name} codes lie on the two outermost levels of their grid (of some rows of all "
        f"weights, while {100 * FULL[bits]:g} % is much): their scales keep these weights from growing. Train with "
        f"{remedy}a larger `headroom` (docs/concepts/low-bit-sr.md).",
        stacklevel=2,
    )
