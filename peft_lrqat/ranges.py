"""Where the first scale s0 (and zero point) of a weight comes from.

Three methods: `minmax` covers every weight; `lp` searches the scale that minimises sum |w - W^|^p over the weights that
share it (LR-QAT, arXiv 2406.06385, section 4: L_p norm range setting with a grid search); `absmean`, for low-bit
training, puts the mean magnitude on the highest level (DQT, arXiv 2412.04787, eq. 2, and BitNet b1.58 for ternary).

The search is exact over its candidates: clipping at 1 %, 2 %, ..., 100 % of the largest magnitude, as in the paper, and
besides, the steps that put the largest magnitude on level 1, 2, ..., 2^(bits-1). The latter make the search idempotent:
a weight that already lies on a grid keeps it, so re-quantizing a quantized model changes nothing. (Where the weight was
rounded to its dtype since, `lattice.py` finds the scale that gives it back.) Every candidate is
snapped to what the checkpoint can store *before* it is judged.

A symmetric grid has one level more on one side. With `signed`, every scale chooses the side, by its sign. `minmax`
takes the smaller magnitude. `lp` tries all candidates with the side of the largest weight; below 4 bits, with the other
side too (from 4 bits on that gains less than 0.4 % of the error, and takes as long again).

The arithmetic is the same on every device: elementwise IEEE operations (no `pow` where p is a multiple of 1/2), sums in
fp64. An adapter file relies on it, because loading recomputes s0 from the base model (and verifies it by a checksum).
"""

from __future__ import annotations

import itertools

import torch

from .chunks import chunk_size, row_chunks
from .grid import Grid, snap_magnitude
from .lattice import recover_scale

RANGE_METHODS = ("lp", "minmax")
LOW_BIT_RANGE_METHODS = ("absmean", "minmax", "lp")
_CLIP_STEPS = 100
_ONE_SIDE_FROM_BITS = 4
# errors are summed in fp32 first: a candidate is left out only if it is worse by more than that can blur
_MARGIN = 1 + 1e-4


def choose_range(
    weight: torch.Tensor,
    grid: Grid,
    method: str = "lp",
    p: float = 2.5,
    scale_dtype: str = "auto",
    signed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Choose scales and zero points for a weight.

    Args:
        weight: (out, in) float tensor, weight units, finite.
        grid: the grid; its group size must divide `in`.
        method: "lp", "minmax", or "absmean" (symmetric grids only).
        p: exponent of the error norm, > 0 (only for "lp").
        scale_dtype: see `snap_scale`.
        signed: whether scales may be negative ("lp" and "minmax" on symmetric grids).

    Returns:
        scale: fp32 (rows, groups), already snapped; zero_point: int8 (rows, groups) or None if symmetric.

    Raises:
        ValueError: the group size does not divide `in`; there is no such `scale_dtype`.

    Memory: a few row chunks of fp32 above the inputs and outputs.
    """
    out_features, in_features = weight.shape
    grid.check_divides(in_features)
    rows, groups = grid.scale_shape(out_features, in_features)
    device = weight.device
    scale = torch.empty(rows, groups, device=device)
    zero_point = None if grid.symmetric else torch.empty(rows, groups, dtype=torch.int8, device=device)

    if rows == out_features and grid.group_size != 0:
        for rows_ in row_chunks(out_features, in_features, device):
            # (chunk rows * groups, group size): one line for each scale
            lines = weight[rows_].float().reshape(-1, in_features // groups).contiguous()
            chosen = _search([lines], grid, method, p, scale_dtype, signed, weight.dtype)
            scale[rows_] = chosen[0].view(-1, groups)
            if zero_point is not None:
                zero_point[rows_] = chosen[1].view(-1, groups).to(torch.int8)
    else:  # one scale for all: the chunks are the parts of a single line
        parts = [weight[rows_].float().reshape(1, -1) for rows_ in row_chunks(out_features, in_features, device)]
        chosen = _search(parts, grid, method, p, scale_dtype, signed, weight.dtype)
        scale.copy_(chosen[0].view(1, 1))
        if zero_point is not None:
            zero_point.copy_(chosen[1].view(1, 1))
    return scale, zero_point


def _search(
    parts: list[torch.Tensor],
    grid: Grid,
    method: str,
    p: float,
    scale_dtype: str,
    signed: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the best (scale, centred zero point) of each line, fp32 (lines,); `parts` are fp32 (lines, n) tensors of
    numbers in `dtype` that together make up the lines."""
    scale, zero = _best(parts, grid, method, p, scale_dtype, signed)
    if method == "absmean":
        return scale, zero
    return recover_scale(parts, scale, zero, grid, scale_dtype, dtype), zero


def _best(
    parts: list[torch.Tensor], grid: Grid, method: str, p: float, scale_dtype: str, signed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    lo = torch.stack([part.float().amin(dim=1) for part in parts]).amin(dim=0).clamp_(max=0)
    hi = torch.stack([part.float().amax(dim=1) for part in parts]).amax(dim=0).clamp_(min=0)

    if method == "absmean":
        count = sum(part.shape[1] for part in parts)
        total = torch.stack([_line_sum(part.float().abs()) for part in parts]).sum(dim=0)
        scale = snap_magnitude((total / (count * grid.qmax)).float(), scale_dtype)
        return scale, torch.zeros_like(scale)
    top = grid.qmax if grid.symmetric else grid.qmax - grid.qmin
    scale, zero = _smallest_that_clips_nothing(lo, hi, grid, scale_dtype)
    if signed:  # the codes of W with a negative scale are those of -W with a positive one
        turned, _ = _smallest_that_clips_nothing(-hi, -lo, grid, scale_dtype)
        scale = torch.where(turned < scale, -turned, scale)
    if method == "minmax":
        return scale, zero

    levels = -grid.qmin if grid.symmetric else top
    # steps that make up the covered magnitude; the first (100 %: min-max) wins where candidates tie
    divisors = [top * _CLIP_STEPS / i for i in range(_CLIP_STEPS, 0, -1)] + list(range(1, levels + 1))
    best_scale, best_zero = scale, zero
    best_error = torch.full(lo.shape, torch.inf, dtype=torch.float64, device=lo.device)
    widest = max(part.numel() for part in parts)
    at_a_time = min(len(divisors), max(1, chunk_size(lo.device) // max(1, widest)))  # small weights: fewer launches
    work, spare = (torch.empty(at_a_time * widest, device=lo.device) for _ in range(2))
    sides = [torch.where(hi > -lo, -1.0, 1.0)] if signed else [torch.ones_like(lo)]
    if signed and grid.bits < _ONE_SIDE_FROM_BITS:
        sides.append(-sides[0])
    starts = range(0, len(divisors), at_a_time)
    for side, first in itertools.product(sides, starts):
        some = divisors[first : first + at_a_time]
        scale, zero = _candidates(lo, hi, some, grid, scale_dtype)
        scale *= side
        if min(some) > top and bool((_least_clipping(lo, hi, scale, zero, grid) ** p > best_error * _MARGIN).all()):
            continue  # the largest weight alone costs more than the best candidate so far: for every line
        error = torch.zeros(scale.shape, dtype=torch.float64, device=lo.device)
        for part in parts:
            size = len(some) * part.numel()
            error += _error(part, scale, zero, grid, p, work[:size], spare[:size])
        error *= scale.double().abs() ** p
        winner = error.argmin(dim=0, keepdim=True)  # the first of equals
        error, scale, zero = (values.gather(0, winner).squeeze(0) for values in (error, scale, zero))
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _least_clipping(
    lo: torch.Tensor, hi: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Bound a line's largest error from below, in weight units, by what the grid's ends cut off its extremes; fp64."""
    step, zero = scale.double(), zero.double()
    ends = step * (grid.qmin - zero), step * (grid.qmax - zero)
    below, above = torch.minimum(*ends) - lo, hi - torch.maximum(*ends)
    return torch.maximum(below, above).clamp_(min=0)


def _smallest_that_clips_nothing(
    lo: torch.Tensor, hi: torch.Tensor, grid: Grid, scale_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the scale and centred zero point of each line by its extremes; fp32 (lines,)."""
    if grid.symmetric:
        top, bottom = torch.tensor([[grid.qmax], [grid.qmin]], dtype=torch.float32, device=lo.device)
        scale = snap_magnitude(torch.maximum(hi / top, lo / bottom), scale_dtype)
        return scale, torch.zeros_like(scale)
    scale, zero = _candidates(lo, hi, [grid.qmax - grid.qmin], grid, scale_dtype)
    return scale[0], zero[0]


def _candidates(
    lo: torch.Tensor, hi: torch.Tensor, divisors: list[float], grid: Grid, scale_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute scales and centred zero points (divisors, lines): the largest magnitude (asymmetric: the span) makes so
    many steps."""
    # tensors on the device: a GPU divides by a Python number by multiplying with its rounded inverse
    steps = torch.tensor(divisors, dtype=torch.float32, device=lo.device).unsqueeze(1)
    if grid.symmetric:
        scale = snap_magnitude(torch.maximum(hi, -lo) / steps, scale_dtype)
        return scale, torch.zeros_like(scale)
    top = grid.qmax - grid.qmin
    scale = snap_magnitude((hi - lo) / steps, scale_dtype)
    # clipping shrinks both ends alike; a coarser step clips nothing
    kept = torch.tensor([min(1.0, top / d) for d in divisors], dtype=torch.float32, device=lo.device).unsqueeze(1)
    zero = (-lo * kept / scale).round_() + grid.qmin
    return scale, zero.clamp_(grid.qmin, grid.qmax)


def _error(
    lines: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    grid: Grid,
    p: float,
    levels: torch.Tensor,
    nearest: torch.Tensor,
) -> torch.Tensor:
    """Sum |x - round(x)|^p over each of the `lines` (lines, n), x in grid steps, for each candidate scale.

    Args:
        scale, zero: (candidates, lines).
        levels, nearest: work space of candidates x lines x n elements.

    Returns:
        fp64 (candidates, lines).
    """
    shape = (*scale.shape, lines.shape[1])
    levels, nearest = levels.view(shape), nearest.view(shape)
    torch.div(lines.unsqueeze(0), scale.unsqueeze(2), out=levels)
    torch.round(levels, out=nearest)
    if grid.symmetric:
        nearest.clamp_(grid.qmin, grid.qmax)
    else:
        zero = zero.unsqueeze(2)
        nearest.add_(zero).clamp_(grid.qmin, grid.qmax).sub_(zero)
    powers = _power(levels.sub_(nearest).abs_(), p, nearest)
    return _line_sum(powers.view(-1, shape[2])).view(scale.shape)


def _line_sum(values: torch.Tensor) -> torch.Tensor:
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


def _power(miss: torch.Tensor, p: float, out: torch.Tensor) -> torch.Tensor:
    """Compute miss^p for miss >= 0, written to `out`.

    Products and square roots are rounded as IEEE says on every device; `pow` is not, and many times slower. So whole
    and half p, and those a quarter above a whole number, are made of the former.
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
    return torch.pow(miss, p, out=out)
