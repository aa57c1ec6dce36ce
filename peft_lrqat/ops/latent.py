"""Latent weights: an int8 behind each packed code, which remembers where between (and beyond) the levels it belongs.

    x = q + k / 64        grid steps; q the packed code, k int8 of the optimizer's state

The forward sees q alone. A step moves x, rounds it to the nearest code, and keeps what is left:

    x' = x + d            q' = clip(q + round(x' - q))            k' = floor(64 (x' - q') + u), in [-127, 127]

So a weight does not tremble between two levels, as stochastic rounding of the code has it, and inside one it has the
inertia of a float master (a straight-through estimator's): it may lie almost two steps beyond the last level, and takes
as long to come back. x' = x changes nothing: a weight midway between two levels stays where it is.

A ternary grid follows its latent weights, as BitNet b1.58 (arXiv 2402.17764) takes the mean magnitude of its masters:

    s' = snap(s mean|x| / c)        c = mean|x| when training began, so that the first s' is s
    x' = (x + d) s / s'             the step above, in steps of s'

where the means are of the weights that share a scale. The masters grow in training; with a fixed scale they would leave
the level 0 empty. mean|x| is a sum of integers, equal on every device. A scale whose codes are all 0 at the start (a
layer that begins at zero) has no distribution to keep; its c is that of a usual one, 3/4. One code that is not is a
distribution, however sparse: another c would make a third of a step of noise out of every zero of a trained weight.
"""

from __future__ import annotations

import torch

from ..chunks import row_chunks
from ..grid import Grid, grouped, rows_of, snap_scale, sum_per_scale
from ..packing import unpack
from ..rounding import random_words, uniform

#: Parts of a grid step that a latent weight counts in.
PARTS = 64
#: How far it may lie beyond the outermost levels, and from its code: grid steps.
REACH = 127 / PARTS
#: Stands where nobody knows where a float weight lay.
UNKNOWN = -128


def places_of(weight: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Tell where float weights lie: int8 (out, in), in 64ths of a step from the nearest code.

    A scale whose weights all lie on its levels has UNKNOWN for them: they were trained there, or not at all.

    Args:
        weight: (out, in), weight units, any float dtype.
        scale: fp32 (rows, groups), weight units per grid step.
    """
    places = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    beside = torch.zeros(scale.shape, dtype=torch.int64, device=weight.device)
    for rows in row_chunks(weight.shape[0], weight.shape[1], weight.device):
        levels = grouped(weight[rows].float().contiguous(), scale) / rows_of(scale, rows).unsqueeze(-1)
        codes = levels.round().clamp_(grid.qmin, grid.qmax)
        found = (levels - codes).mul_(PARTS).round_().clamp_(-127, 127).to(torch.int8)
        rows_of(beside, rows).add_(sum_per_scale(found != 0, scale))
        places[rows] = found.view(-1, weight.shape[1])
    grouped(places, scale).masked_fill_((beside == 0).unsqueeze(-1), UNKNOWN)
    return places


def new_latent(
    packed: torch.Tensor, stream: torch.Tensor, columns: int, places: torch.Tensor | None = None
) -> torch.Tensor:
    """Start latent weights: where float weights lay, or else anywhere that rounds to the code, with equal chance.

    Counts as a rounding.

    All at their codes would have to go half a step before the first of them changes, and would arrive together.

    Args:
        packed, stream: of the weight, as for `step_codes`. The stream moves on by one.
        columns: in_features.
        places: int8 (out, in), `places_of` or UNKNOWN; None: nobody knows any.

    Returns:
        int8 (out, in), in 64ths of a step from the code; at most 31 where nobody knows.
    """
    latent = torch.empty(packed.shape[0], columns, dtype=torch.int8, device=packed.device)
    for rows in row_chunks(packed.shape[0], columns, packed.device):
        numbers = torch.arange(rows.start, rows.stop, device=packed.device)
        u = uniform(random_words(numbers, columns, stream[1], stream[0]))
        anywhere = ((u * (PARTS - 1)).floor() - (PARTS // 2 - 1)).to(torch.int8)
        known = None if places is None else places[rows]
        latent[rows] = anywhere if known is None else torch.where(known == UNKNOWN, anywhere, known)
    stream[1].add_(1)
    return latent


def mean_magnitude(
    packed: torch.Tensor, latent: torch.Tensor | None, scale: torch.Tensor, grid: Grid, columns: int
) -> torch.Tensor:
    """Average |x| over the weights that share a scale: fp64, in the shape of `scale`, grid steps.

    Args:
        packed, scale: of the weight, as for `step_codes`.
        latent: int8 (out, in). None: all 0.
        columns: in_features.
    """
    sums = torch.zeros(scale.shape, dtype=torch.int64, device=packed.device)
    for rows in row_chunks(packed.shape[0], columns, packed.device):
        x = unpack(packed[rows], grid.code_bits, columns).to(torch.int16) * PARTS
        if latent is not None:
            x += latent[rows]
        rows_of(sums, rows).add_(sum_per_scale(x.abs_(), rows_of(sums, rows)))
    return sums.double() * (scale.numel() / (PARTS * packed.shape[0] * columns))


def first_magnitude(mean: torch.Tensor, of_codes: torch.Tensor) -> torch.Tensor:
    """Choose c: fp32, in the shape of `mean`.

    Args:
        mean: `mean_magnitude` at the start.
        of_codes: the same without latent weights.
    """
    return torch.where(of_codes == 0, 0.75, mean).float()


def follow_magnitude(
    packed: torch.Tensor, latent: torch.Tensor, scale: torch.Tensor, start: torch.Tensor, lr: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Let scales follow, in place: s' = snap(s mean|x| / c). With a learning rate of 0 they stay.

    Any checkpoint stores s' exactly, whatever its `scale_dtype` is.

    Args:
        packed: of the weight, as for `step_codes`.
        latent: int8 (out, in).
        scale: fp32 (rows, groups). Updated.
        start: fp32 (rows, groups), c.
        lr: fp32 scalar.

    Returns:
        fp32 (rows, groups): what `scale` was.
    """
    mean = mean_magnitude(packed, latent, scale, grid, latent.shape[1])
    before = scale.clone()
    followed = snap_scale((scale.double() * mean / start).float(), "auto")
    scale.copy_(torch.where(lr > 0, followed, scale))
    return before


def round_latent(codes: torch.Tensor, target: torch.Tensor, u: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, ...]:
    """Round x' to the code nearest to it, and to 64ths.

    Args:
        codes: fp32 (...), the codes before the step.
        target: fp32 (...), x', grid steps.
        u: fp32 (...), uniform in (0, 1).

    Returns:
        fp32 (...), q' and k': integers. Where `target` is not finite, both are in range.
    """
    rounded = (codes + (target - codes).round()).nan_to_num(nan=0.0).clamp(grid.qmin, grid.qmax)
    left = ((target - rounded) * PARTS + u).floor().nan_to_num(nan=0.0).clamp(-127, 127)
    return rounded, left
