"""`ranges.choose_range(..., "lp")` as it was first written: every candidate judged, over all weights. Slow.

The files of adapters rely on what it gives, bit for bit: their bases are made anew when they are loaded.
"""

from __future__ import annotations

import itertools

import torch

from peft_lrqat.chunks import row_chunks
from peft_lrqat.grid import Grid, snap_magnitude, with_sign_of
from peft_lrqat.lattice import _HALF_STEP, on_grid
from peft_lrqat.lattice import _levels as levels_of
from peft_lrqat.range_search import power

WORK = 1 << 18
_CLIP_STEPS = 100
_ONE_SIDE_FROM_BITS = 4


def choose_range_slowly(
    weight: torch.Tensor, grid: Grid, p: float = 2.5, scale_dtype: str = "auto", signed: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `choose_range`, of all rows at once."""
    rows, groups = grid.scale_shape(*weight.shape)
    if rows == weight.shape[0] and grid.group_size != 0:
        parts = [weight.float().reshape(rows * groups, -1).contiguous()]
    else:
        parts = [weight[some].float().reshape(1, -1) for some in row_chunks(*weight.shape, weight.device)]
    scale, zero = _best(parts, grid, p, scale_dtype, signed)
    scale = _recover(parts, scale, zero, grid, scale_dtype, weight.dtype)
    return scale.view(rows, groups), None if grid.symmetric else zero.view(rows, groups).to(torch.int8)


def _recover(
    parts: list[torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor,
    grid: Grid,
    scale_dtype: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `lattice.recover_scale`, of every weight of every line."""
    for low in [dtype] if dtype in _HALF_STEP else list(_HALF_STEP):
        if not any(bool((part.to(low).float() == part).all(dim=1).any()) for part in parts):
            continue
        least, most = torch.zeros_like(scale), torch.full_like(scale, torch.inf)
        for part in parts:
            steps = levels_of(part, scale, zero, grid).abs_()
            bits = part.abs().view(torch.int32)
            below, above = ((bits + half).view(torch.float32) / steps for half in (-_HALF_STEP[low], _HALF_STEP[low]))
            least = torch.maximum(least, torch.where(steps > 0, below, 0.0).amax(dim=1))
            most = torch.minimum(most, torch.where(steps > 0, above, torch.inf).amin(dim=1))
        found = with_sign_of(scale, snap_magnitude((least + most) * 0.5, scale_dtype))
        better = on_grid(parts, found, zero, grid, low, scale) & ~on_grid(parts, scale, zero, grid, low)
        scale = torch.where(better, found, scale)
    return scale


def _best(
    parts: list[torch.Tensor], grid: Grid, p: float, scale_dtype: str, signed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    lo = torch.stack([part.float().amin(dim=1) for part in parts]).amin(dim=0).clamp_(max=0)
    hi = torch.stack([part.float().amax(dim=1) for part in parts]).amax(dim=0).clamp_(min=0)

    top = grid.qmax if grid.symmetric else grid.qmax - grid.qmin
    scale, zero = _smallest_that_clips_nothing(lo, hi, grid, scale_dtype)
    if signed:  # the codes of W with a negative scale are those of -W with a positive one
        turned, _ = _smallest_that_clips_nothing(-hi, -lo, grid, scale_dtype)
        scale = torch.where(turned < scale, -turned, scale)
    levels = -grid.qmin if grid.symmetric else top
    # steps that make up the covered magnitude; the first (100 %: min-max) wins where candidates tie
    divisors = [top * _CLIP_STEPS / i for i in range(_CLIP_STEPS, 0, -1)] + list(range(1, levels + 1))
    best_scale, best_zero = scale, zero
    best_error = torch.full(lo.shape, torch.inf, dtype=torch.float64, device=lo.device)
    widest = max(part.numel() for part in parts)
    at_a_time = min(len(divisors), max(1, WORK // max(1, widest)))  # small weights: fewer launches
    work, spare = (torch.empty(at_a_time * widest, device=lo.device) for _ in range(2))
    sides = [torch.where(hi > -lo, -1.0, 1.0)] if signed else [torch.ones_like(lo)]
    if signed and grid.bits < _ONE_SIDE_FROM_BITS:
        sides.append(-sides[0])
    starts = range(0, len(divisors), at_a_time)
    for side, first in itertools.product(sides, starts):
        some = divisors[first : first + at_a_time]
        scale, zero = _candidates(lo, hi, some, grid, scale_dtype)
        scale *= side
        error = torch.zeros(scale.shape, dtype=torch.float64, device=lo.device)
        for part in parts:
            size = len(some) * part.numel()
            error += _error(part, scale, zero, grid, p, work[:size], spare[:size])
        # not **: where candidates tie, its last bit would choose, which is another on a GPU
        size = scale.double().abs().flatten()
        error *= power(size, p, torch.empty_like(size)).view(scale.shape)
        winner = error.argmin(dim=0, keepdim=True)  # the first of equals
        error, scale, zero = (values.gather(0, winner).squeeze(0) for values in (error, scale, zero))
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


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
