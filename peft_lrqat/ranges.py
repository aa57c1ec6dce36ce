"""Where the first scale s0 (and zero point) of a weight comes from.

Three methods: `minmax` covers every weight; `lp` searches the scale that minimises sum |w - W^|^p over the weights that
share it (LR-QAT, arXiv 2406.06385, section 4: L_p norm range setting with a grid search); `absmean`, for low-bit
training, puts the mean magnitude on the highest level (DQT, arXiv 2412.04787, eq. 2, and BitNet b1.58 for ternary).

The search is exact over its candidates: clipping at 1 %, 2 %, ..., 100 % of the largest magnitude, as in the paper, and
the steps that put the largest magnitude on level 1, 2, ..., 2^(bits-1). The latter make the search idempotent: a weight
that already lies on a grid keeps it, so re-quantizing a quantized model changes nothing. (If the weight was rounded to
its dtype since, `lattice.py` finds the scale that gives it back.) Every candidate is snapped to what the checkpoint can
store *before* it is judged.

A symmetric grid has one level more on one side. With `signed`, every scale chooses the side, by its sign. `minmax`
takes the smaller magnitude. `lp` tries all candidates with the side of the largest weight; below 4 bits, with the other
side too (from 4 bits on that gains less than 0.4 % of the error, and takes as long again).

`range_search.py` searches, and leaves out what cannot be the best. The arithmetic is the same on every device:
elementwise IEEE operations (no `pow` where p is a multiple of 1/2), sums in fp64. An adapter file relies on it, because
loading recomputes s0 from the base model (and verifies it by a checksum).
"""

from __future__ import annotations

import torch

from .chunks import row_chunks
from .grid import Grid, snap_magnitude
from .lattice import recover_scale
from .range_search import divisors_of, line_sum, search

RANGE_METHODS = ("lp", "minmax")
LOW_BIT_RANGE_METHODS = ("absmean", "minmax", "lp")


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
    scale = torch.empty(rows, groups, dtype=torch.float32, device=device)
    zero_point = None if grid.symmetric else torch.empty(rows, groups, dtype=torch.int8, device=device)

    if rows == out_features and grid.group_size != 0:
        # the search of small groups takes more for their candidates than for their weights
        width = max(in_features, groups * len(divisors_of(grid)))
        for rows_ in row_chunks(out_features, width, device):
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
        total = torch.stack([line_sum(part.float().abs()) for part in parts]).sum(dim=0)
        scale = snap_magnitude((total / (count * grid.qmax)).float(), scale_dtype)
        return scale, torch.zeros_like(scale)
    scale, zero = _smallest_that_clips_nothing(lo, hi, grid, scale_dtype)
    if signed:  # the codes of W with a negative scale are those of -W with a positive one
        turned, _ = _smallest_that_clips_nothing(-hi, -lo, grid, scale_dtype)
        scale = torch.where(turned < scale, -turned, scale)
    if method == "minmax":
        return scale, zero

    found, found_zero, error = search(parts, lo, hi, grid, p, scale_dtype, signed)
    finite = error < torch.inf
    return torch.where(finite, found, scale), torch.where(finite, found_zero, zero)


def _smallest_that_clips_nothing(
    lo: torch.Tensor, hi: torch.Tensor, grid: Grid, scale_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the scale and centred zero point of each line by its extremes; fp32 (lines,)."""
    if grid.symmetric:
        top, bottom = torch.tensor([[grid.qmax], [grid.qmin]], dtype=torch.float32, device=lo.device)
        scale = snap_magnitude(torch.maximum(hi / top, lo / bottom), scale_dtype)
        return scale, torch.zeros_like(scale)
    span = torch.tensor(grid.qmax - grid.qmin, dtype=torch.float32, device=lo.device)
    scale = snap_magnitude((hi - lo) / span, scale_dtype)
    zero = (-lo / scale).round_() + grid.qmin
    return scale, zero.clamp_(grid.qmin, grid.qmax)
