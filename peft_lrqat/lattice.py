"""Weights that lie on a grid already, up to the rounding to the dtype that they were stored in.

The floats of a model that was quantized before are like that: Google's Gemma "qat-q4_0-unquantized", or any checkpoint
that was dequantized. They are s (q - z), rounded to bf16 or fp16, so that the largest of them no longer tells s: 8 s
has 8 significant bits in bf16, where s, an fp16 number, has 11. But each weight says within which bounds s lies:

    the halfway points to the neighbours of |w| in its dtype, divided by |q - z|

A scale within the bounds of all weights that share it gives every one of them back.
"""

from __future__ import annotations

import torch

from .grid import Grid, snap_magnitude, with_sign_of

# half a step between neighbours, in fp32's bits (not for fp16's subnormal numbers, which are left as they are)
_HALF_STEP = {torch.bfloat16: 1 << 15, torch.float16: 1 << 12}
_SAMPLE = 32  # weights of a line that are looked at first


def recover_scale(
    parts: list[torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor,
    grid: Grid,
    scale_dtype: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Replace scales by near ones that give the weights back exactly, where there are any.

    Args:
        parts: fp32 (lines, n) each; all parts of a line share its scale.
        scale, zero: fp32 (lines,), a scale near enough for the right codes, and the centred zero point.
        scale_dtype: see `grid.snap_scale`.
        dtype: of the weight; numbers in bf16 or fp16 are looked for in fp32 too.

    Returns:
        fp32 (lines,); unchanged where the line does not lie on the grid, and where its scale gave it back already.
    """
    for low in [dtype] if dtype in _HALF_STEP else list(_HALF_STEP):
        if not any(bool((part.to(low).float() == part).all(dim=1).any()) for part in parts):
            continue
        # nearly all lines of an ordinary model are ruled out by their first weights
        least, most = _bounds([parts[0][:, :_SAMPLE]], scale, zero, grid, low, torch.finfo(low).tiny)
        left = (least <= most * (1 + 1e-6)).nonzero().squeeze(1)
        if left.numel():
            lines = parts if left.numel() == scale.numel() else [part[left] for part in parts]
            scale = scale.index_copy(0, left, _recover(lines, scale[left], zero[left], grid, scale_dtype, low))
    return scale


def _recover(
    parts: list[torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor,
    grid: Grid,
    scale_dtype: str,
    low: torch.dtype,
) -> torch.Tensor:
    """Replace scales as `recover_scale` does, for weights that were rounded to `low`."""
    least, most = _bounds(parts, scale, zero, grid, low)
    found = with_sign_of(scale, snap_magnitude((least + most) * 0.5, scale_dtype))
    better = on_grid(parts, found, zero, grid, low, scale) & ~on_grid(parts, scale, zero, grid, low)
    return torch.where(better, found, scale)


def _bounds(
    parts: list[torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor,
    grid: Grid,
    low: torch.dtype,
    smallest: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bound the scales of lines by their weights of at least `smallest`: least and most, fp32 (lines,)."""
    least, most = torch.zeros_like(scale), torch.full_like(scale, torch.inf)
    for part in parts:
        steps = _levels(part, scale, zero, grid).abs_()
        size = part.abs()
        says = (steps > 0) & (size >= smallest)
        bits = size.view(torch.int32)
        below, above = ((bits + half).view(torch.float32) / steps for half in (-_HALF_STEP[low], _HALF_STEP[low]))
        least = torch.maximum(least, torch.where(says, below, 0.0).amax(dim=1))
        most = torch.minimum(most, torch.where(says, above, torch.inf).amin(dim=1))
    return least, most


def on_grid(
    parts: list[torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor,
    grid: Grid,
    dtype: torch.dtype,
    codes_by: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tell which lines are s (q - z), rounded to `dtype`, of whole codes: bool (lines,).

    Args:
        codes_by: the scale that gives the codes; None: `scale`.
    """
    exact = torch.ones_like(scale, dtype=torch.bool)
    for part in parts:
        levels = _levels(part, scale if codes_by is None else codes_by, zero, grid)
        exact &= ((levels * scale.unsqueeze(1)).to(dtype).float() == part).all(dim=1)
    return exact


def _levels(part: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The levels q - z nearest to the weights of some lines: fp32 (lines, n)."""
    zero = zero.unsqueeze(1)
    levels = (part / scale.unsqueeze(1)).round_().add_(zero)
    return levels.clamp_(grid.qmin, grid.qmax).sub_(zero)
