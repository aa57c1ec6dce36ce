"""The search of `ranges.py` for the scale that minimises sum |w - W^|^p, without judging every candidate.

The error of a candidate is bounded from below, and only candidates whose bound is not above the error of a good one are
judged: the result is, bit for bit, that of judging all.

The bound is a sum over a line's weights of numbers from a table. With u = w / r, where r is a line's largest magnitude
(asymmetric: its span), a candidate puts w on level u d, up to the snapping of the scale; every line has the same
divisors d. So the table has a row for each bin of u and a column for each candidate: the least error, in units of r,
that a weight of that bin can have. It is made once for a grid, and summing its rows takes a read of memory a weight and
candidate instead of ten operations. Where snapping moves a scale farther than rounding does (out of the range of its
dtype), the bound does not hold and is not used.

Another bound is the error of the largest weight alone, which a candidate cuts off.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .chunks import chunk_size
from .grid import Grid, scale_bounds, snap_magnitude

_CLIP_STEPS = 100
_ONE_SIDE_FROM_BITS = 4
# errors are summed in fp32 first: a candidate is left out only if it is worse by more than that can blur
_MARGIN = 1 + 1e-4
_BINS = 1024  # of the table, for each half
_BAG = 512  # weights that are added up in fp32
_TABLE_FROM = 1 << 14  # below so many weights, making the table costs more than it saves
# how far snapping may move a scale, relatively, and from which magnitude on it moves none farther
_SNAPS = {"auto": (2.0**-8, 2.0**-17), "bf16": (2.0**-8, 0.0), "fp16": (2.0**-11, 2.0**-14), "fp32": (0.0, 0.0)}


def search(
    parts: list[torch.Tensor],
    lo: torch.Tensor,
    hi: torch.Tensor,
    grid: Grid,
    p: float,
    scale_dtype: str,
    signed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the best candidate of each line.

    Args:
        parts: fp32 (lines, n) each, weight units; all parts of a line share its scale.
        lo, hi: fp32 (lines,), the extremes of each line, or 0.
        grid, p, scale_dtype, signed: as in `ranges.choose_range`.

    Returns:
        scale, centred zero point: fp32 (lines,); error: sum |w - W^|^p, fp64 (lines,).
    """
    ours = _Candidates(lo, hi, grid, scale_dtype, signed)
    lines = torch.arange(lo.numel(), device=lo.device)
    bound = _bounds(parts, lo, hi, ours, grid, p, scale_dtype)
    first = torch.zeros_like(lines)
    if bound is not None:
        first = torch.where((bound > 0) & (ours.reach > 0).unsqueeze(1), bound, torch.inf).argmin(dim=1)
    best_scale, best_zero = ours.at(lines, first)
    best = _errors(parts, lines, best_scale, best_zero, grid, p)

    allowed = best * (_MARGIN + 2.0**-22 * _BAG)
    if bound is None:
        open_ = torch.ones(lo.numel(), ours.count, dtype=torch.bool, device=lo.device)
    else:
        unit = ours.reach.double() ** p
        limit = torch.where(unit > 1e-280, allowed / unit, torch.inf).float()
        open_ = ~(bound > limit.unsqueeze(1))
    open_[lines, first] = False
    open_ &= (ours.reach > 0).unsqueeze(1)  # all candidates suit zeros
    left = open_.nonzero(as_tuple=True)
    least, winner = best, first
    for line, which in zip(*(indices.split(max(1, chunk_size(lo.device) // 16)) for indices in left), strict=True):
        scale, zero = ours.at(line, which)
        kept = ~(_least_clipping(lo[line], hi[line], scale, zero, grid) ** p > allowed[line])
        line, which = line[kept], which[kept]
        error = _errors(parts, line, scale[kept], zero[kept], grid, p)
        # of each line the least, and of equals the first
        before, least = least, least.scatter_reduce(0, line, error, "amin")
        winner = torch.where(before == least, winner, ours.count)
        winner = winner.scatter_reduce(0, line, torch.where(error == least[line], which, ours.count), "amin")
    return *ours.at(lines, winner.clamp_(max=ours.count - 1)), least


class _Candidates:
    """The scales and centred zero points that a search chooses from, by their number; the first is min-max.

    Attributes:
        reach: fp32 (lines,), the largest magnitude of each line (asymmetric: the span).
        side: fp32 (lines,), 1 or -1: the sign of the first half of the scales, or of all.
    """

    def __init__(self, lo: torch.Tensor, hi: torch.Tensor, grid: Grid, scale_dtype: str, signed: bool) -> None:
        self.lo, self.grid, self.scale_dtype = lo, grid, scale_dtype
        self.reach = torch.maximum(hi, -lo) if grid.symmetric else hi - lo
        self.side = torch.where(hi > -lo, -1.0, 1.0) if signed else torch.ones_like(lo)
        self.sides = 2 if signed and grid.bits < _ONE_SIDE_FROM_BITS else 1
        divisors = divisors_of(grid)
        self.count = self.sides * len(divisors)
        # tensors on the device: a GPU divides by a Python number by multiplying with its rounded inverse
        self.steps = torch.tensor(divisors * self.sides, dtype=torch.float32, device=lo.device)
        self.turn = torch.ones_like(self.steps)
        self.turn[len(divisors) :] = -1
        # clipping shrinks both ends alike; a coarser step clips nothing
        kept = [min(1.0, (grid.qmax - grid.qmin) / d) for d in divisors]
        self.kept = torch.tensor(kept, dtype=torch.float32, device=lo.device)

    def at(self, line: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and centred zero point of the candidates `which` of the lines `line`; fp32, of their shape."""
        scale = snap_magnitude(self.reach[line] / self.steps[which], self.scale_dtype)
        if self.grid.symmetric:
            return scale * (self.side[line] * self.turn[which]), torch.zeros_like(scale)
        zero = (-self.lo[line] * self.kept[which] / scale).round_() + self.grid.qmin
        return scale, zero.clamp_(self.grid.qmin, self.grid.qmax)


def divisors_of(grid: Grid) -> list[float]:
    """Return how many steps the largest magnitude (asymmetric: the span) makes, for each candidate."""
    top = grid.qmax if grid.symmetric else grid.qmax - grid.qmin
    levels = -grid.qmin if grid.symmetric else top
    # the first (100 %: min-max) wins where candidates tie
    return list(dict.fromkeys([top * _CLIP_STEPS / i for i in range(_CLIP_STEPS, 0, -1)] + list(range(1, levels + 1))))


def _bounds(
    parts: list[torch.Tensor],
    lo: torch.Tensor,
    hi: torch.Tensor,
    ours: _Candidates,
    grid: Grid,
    p: float,
    scale_dtype: str,
) -> torch.Tensor | None:
    """Bound the errors of all candidates from below, in units of reach^p: fp32 (lines, candidates), 0 where unknown."""
    if sum(part.numel() for part in parts) < _TABLE_FROM:
        return None
    table = _table(grid, p, scale_dtype, ours.sides, ours.lo.device)
    unit = (ours.reach.clamp(min=torch.finfo(torch.float32).tiny) * ours.side).unsqueeze(1)
    bound = None
    for part in parts:
        lines, n = part.shape
        bins = (part / unit).mul_(_BINS).add_(_BINS + 0.5).int().clamp_(0, 2 * _BINS).view(-1)
        pieces = torch.arange(0, n, _BAG, device=part.device, dtype=torch.int32)
        offsets = (torch.arange(lines, device=part.device, dtype=torch.int32).unsqueeze(1) * n + pieces).view(-1)
        sums = F.embedding_bag(bins, table, offsets, mode="sum").view(lines, len(pieces), ours.count).sum(dim=1)
        bound = sums if bound is None else bound.add_(sums)
    assert bound is not None
    if not grid.symmetric:  # the table does not know where the grid ends, so the largest weight is exchanged
        every = torch.arange(ours.count, device=lo.device)
        scale, zero = ours.at(torch.arange(lo.numel(), device=lo.device).unsqueeze(1), every)
        cut = _least_clipping(lo.unsqueeze(1), hi.unsqueeze(1), scale, zero, grid).float().div_(unit)
        cut = power(cut.mul_(1 - 2.0**-16), p, torch.empty_like(cut))
        bound = torch.maximum(bound, cut.add_(bound).sub_(table.amax(dim=0)))
    smallest, largest = scale_bounds(scale_dtype)
    smallest = max(smallest, _SNAPS[scale_dtype][1])
    ideal = ours.reach.unsqueeze(1) / ours.steps
    return bound.masked_fill_((ideal < smallest) | (ideal > largest), 0)


@functools.lru_cache(maxsize=4)
def _table(grid: Grid, p: float, scale_dtype: str, sides: int, device: torch.device) -> torch.Tensor:
    """The least |w - W^|^p, in units of reach^p, of a weight in each bin: fp32 (2 * bins + 1, candidates).

    Bin i has the weights that lie nearest to (i - bins) / bins of the reach, turned to the side that the scale has.
    """
    cpu = torch.device("cpu")  # not what a context says, as where models are loaded
    divisors = torch.tensor(divisors_of(grid), dtype=torch.float64, device=cpu).repeat(sides)
    u = torch.arange(-_BINS, _BINS + 1, dtype=torch.float64, device=cpu).unsqueeze(1) / _BINS
    levels = u * divisors
    levels[:, len(divisors) // sides :] *= -1  # no column of one side only
    nearest = levels.round()
    if grid.symmetric:  # where a line's zero point lies is not known here: then it may be anywhere
        nearest.clamp_(grid.qmin, grid.qmax)
    snaps = _SNAPS[scale_dtype][0] + 2.0**-20
    blur = divisors * (0.5 / _BINS + 2.0**-20 + (u.abs() + 1 / _BINS) * snaps)
    least = (levels - nearest).abs_().sub_(blur).clamp_(min=0)
    least = (least * (1 - snaps) / divisors) ** p
    return torch.where(least < 1e-30, 0.0, least).float().to(device)


def _least_clipping(
    lo: torch.Tensor, hi: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Bound a line's largest error from below, in weight units, by what the grid's ends cut off its extremes; fp64."""
    step, zero = scale.double(), zero.double()
    ends = step * (grid.qmin - zero), step * (grid.qmax - zero)
    below, above = torch.minimum(*ends) - lo, hi - torch.maximum(*ends)
    return torch.maximum(below, above).clamp_(min=0)


def _errors(
    parts: list[torch.Tensor], line: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid, p: float
) -> torch.Tensor:
    """Sum |w - W^|^p over the lines `line` with one scale and centred zero point each: fp64, of their shape."""
    device = line.device
    size = chunk_size(device)
    if device.type == "cpu":  # both buffers of each thread stay in its L2 cache
        size = size // 4 * torch.get_num_threads()
    widest = max(part.shape[1] for part in parts)
    at_once = max(1, size // widest)
    levels, nearest = (
        torch.empty(min(at_once, max(1, line.numel())) * widest, dtype=torch.float32, device=device) for _ in range(2)
    )
    total = torch.zeros(line.shape, dtype=torch.float64, device=device)
    for start in range(0, line.numel(), at_once):
        some = slice(start, start + at_once)
        for part in parts:
            shape = (line[some].numel(), part.shape[1])
            size = shape[0] * shape[1]
            work = levels[:size].view(shape), nearest[:size].view(shape)
            total[some] += _error(part, line[some], scale[some], zero[some], grid, p, *work)
    size_of_step = scale.double().abs()
    return total.mul_(power(size_of_step, p, torch.empty_like(size_of_step)))


def _error(
    part: torch.Tensor,
    line: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    grid: Grid,
    p: float,
    levels: torch.Tensor,
    nearest: torch.Tensor,
) -> torch.Tensor:
    """Sum |x - round(x)|^p over lines (`line`,) of a part, x in grid steps: fp64.

    Args:
        levels, nearest: work space of their shape.
    """
    torch.index_select(part, 0, line, out=levels)
    levels.div_(scale.unsqueeze(1))
    torch.round(levels, out=nearest)
    if grid.symmetric:
        nearest.clamp_(grid.qmin, grid.qmax)
    else:
        zero = zero.unsqueeze(1)
        nearest.add_(zero).clamp_(grid.qmin, grid.qmax).sub_(zero)
    return line_sum(power(levels.sub_(nearest).abs_(), p, nearest))


def line_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum each line of fp32 (lines, n) to fp64 (lines,), equal on every device. Overwrites `values`."""
    # fold in halves a few times (elementwise, so equal on every device), then add up what is left in fp64
    width = values.shape[1]
    while width > 32:
        half = width // 2
        values[:, :half].add_(values[:, half : 2 * half])
        if width % 2:
            values[:, 0].add_(values[:, width - 1])
        width = half
    return values[:, :width].sum(dim=1, dtype=torch.float64)


def power(miss: torch.Tensor, p: float, out: torch.Tensor) -> torch.Tensor:
    """Compute miss^p for miss >= 0, written to `out`.

    fp32 or fp64. Products and square roots are rounded as IEEE says on every device; `pow` is not, and many times
    slower. So whole and half p, and those a quarter above a whole number, are made of the former.
    """
    whole, rest = divmod(p, 1)
    if rest in (0, 0.25, 0.5) and 1 <= whole <= 8:
        if not rest:
            out.copy_(miss)
            whole -= 1
        else:
            torch.sqrt(miss, out=out)
            if rest == 0.25:
                out.sqrt_()
        for _ in range(int(whole)):
            out.mul_(miss)
        return out
    if miss.dtype == torch.float64:  # equal numbers need equal powers; torch's vectors and their remainders differ
        return torch.pow(miss.repeat_interleave(2)[::2], p)
    return torch.pow(miss, p, out=out)
