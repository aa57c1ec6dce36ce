"""One weight while its decoder block is trained: an fp32 master, its scales and zero points, and their gradients.

    V  = W / s + z                      in grid steps; W, s and z are trained
    n  = floor(clip(V) 2^k)             V as fx8 keeps it, with k = 8 - bits fraction bits: what is left behind
    W^ = s (round((n + 1/2) / 2^k) - z)  what the block computes with

(LSQ, arXiv 1902.08153; EfficientQAT's Block-AP, arXiv 2407.11062.) The rounding goes through n, so that the integers of
the stored base are those of training, ties included. Gradients, with G = dL/dW^ and M = [qmin <= round(V) <= qmax]:

    dW = M G        ds = sum of G ((Q - z) - M (V - z))        dz = -sum of s G (1 - M)

The parameters are relative to where they start, so that one learning rate suits every layer: W in steps of its first
scale, s as a relative change, z in steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ..grid import Grid, GridTensor, dequantize, grouped, snap_magnitude, sum_per_scale, with_sign_of
from ..ops.stored_base import BaseFormat, decode_base, encode_base, to_eight_bits
from ..ranges import choose_range


class FixedPoint(NamedTuple):
    """A trained weight as it is left behind.

    Attributes:
        numbers: int8 (out, in), V in fixed point (fx8, see `ops.stored_base`); of 8 bits, and ternary: codes.
        scale: fp32 (rows, groups), weight units per grid step.
        zero_point: int8 (rows, groups) in grid steps, or None.
        grid: that the weight was trained for.
    """

    numbers: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    grid: Grid

    def rounded(self) -> GridTensor:
        """The weight on its grid."""
        return GridTensor(_codes(self.numbers, self.grid).to(torch.int8), self.scale, self.zero_point, self.grid)

    def eight_bits(self) -> GridTensor:
        """The weight with its fraction, as the 8-bit weight whose codes the numbers are."""
        return to_eight_bits(*self)


def _numbers(levels: torch.Tensor, grid: Grid) -> torch.Tensor:
    """int8 (out, in) of fp32 centred grid steps, which are overwritten."""
    if _has_fraction(grid):
        return encode_base(levels, grid.code_bits, "fx8")
    return levels.round_().clamp_(grid.qmin, grid.qmax).to(torch.int8)


def _codes(numbers: torch.Tensor, grid: Grid) -> torch.Tensor:
    """fp32 (out, in), the integers that `numbers` round to."""
    if _has_fraction(grid):
        return decode_base(numbers, BaseFormat(grid.code_bits, numbers.shape[1], "fx8")).round_()
    return numbers.float()


def _has_fraction(grid: Grid) -> bool:
    """Whether numbers of a grid have fraction bits; the ternary grid, on which LR-QAT does not train, has none here."""
    return grid.code_bits < 8 and not grid.ternary


class BlockWeight(nn.Module):
    """The trained form of one float weight.

    Parameters:
        weight: fp32 (out, in), in steps of the first scale.
        scale_shift: fp32 (rows, groups), relative change of the scale.
        zero_point: fp32 (rows, groups), grid steps; the nearest integer counts. Asymmetric grids only.
    """

    start: torch.Tensor
    zero_point: nn.Parameter | None

    def __init__(
        self,
        weight: torch.Tensor,
        grid: Grid,
        range_method: str,
        range_p: float,
        scale_dtype: str,
        signed_scales: bool = False,
    ) -> None:
        """
        Args:
            weight: (out, in), any float dtype; it is not changed.
            range_method, range_p, scale_dtype, signed_scales: where scales and zero points start, see `choose_range`.
        """
        super().__init__()
        self.grid, self.scale_dtype, self.dtype = grid, scale_dtype, weight.dtype
        start, zero_point = choose_range(weight, grid, range_method, range_p, scale_dtype, signed_scales)
        steps = grouped(weight.detach().float().contiguous(), start) / start.unsqueeze(-1)
        self.register_buffer("start", start)
        self.weight = nn.Parameter(steps.view(weight.shape))
        self.scale_shift = nn.Parameter(torch.zeros_like(start))
        self.zero_point = None if zero_point is None else nn.Parameter(zero_point.float())

    def forward(self) -> torch.Tensor:
        """W^: (out, in) in the model's dtype, differentiable."""
        scale = self.start * (1 + self.scale_shift)
        scale = scale + (self._stored(scale) - scale).detach()
        zero: torch.Tensor | None = None
        if self.zero_point is not None:
            zero = self.zero_point + (self._integer(self.zero_point) - self.zero_point).detach()
        return _Rounded.apply(self.weight, scale, zero, self.start, self.grid, self.dtype)

    @torch.no_grad()
    def fixed_point(self) -> FixedPoint:
        """What is left behind; its `rounded` weight is the one of `forward`, bit for bit."""
        scale = self._stored(self.start * (1 + self.scale_shift))
        zero = None if self.zero_point is None else self._integer(self.zero_point)
        numbers = _numbers(_levels(self.weight, scale, zero, self.start).view_as(self.weight), self.grid)
        return FixedPoint(numbers, scale, None if zero is None else zero.to(torch.int8), self.grid)

    def _stored(self, scale: torch.Tensor) -> torch.Tensor:
        """A scale that is exact in the file, also as the scale of 8-bit codes, with the sign that it started with."""
        fraction = 2.0 ** (8 - self.grid.code_bits) if _has_fraction(self.grid) else 1.0
        magnitude = with_sign_of(self.start, scale.detach()) / fraction
        return with_sign_of(self.start, snap_magnitude(magnitude, self.scale_dtype) * fraction)

    def _integer(self, zero_point: torch.Tensor) -> torch.Tensor:
        return zero_point.detach().round().clamp(self.grid.qmin, self.grid.qmax)


def _levels(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, start: torch.Tensor
) -> torch.Tensor:
    """V: fp32 (out, groups, in / groups), centred grid steps."""
    levels = grouped(weight, scale) * (start / scale).unsqueeze(-1)
    return levels if zero_point is None else levels.add_(zero_point.unsqueeze(-1))


class _Rounded(torch.autograd.Function):
    """W^ of (W, s, z); only these are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        start: torch.Tensor,
        grid: Grid,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scale, zero_point, start)
        ctx.grid = grid
        numbers = _numbers(_levels(weight, scale, zero_point, start).view_as(weight), grid)
        return dequantize(_codes(numbers, grid), scale, zero_point, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scale, zero_point, start = ctx.saved_tensors
        grad = grouped(grad.float().contiguous(), scale)
        levels = _levels(weight, scale, zero_point, start)
        codes = levels.round()
        clipped = (codes < ctx.grid.qmin) | (codes > ctx.grid.qmax)
        codes = codes.clamp_(ctx.grid.qmin, ctx.grid.qmax)
        inside = grad.masked_fill(clipped, 0)
        # in range, W^ differs from W by the rounding only; clipped, it is s times an end of the grid
        subtracted = torch.where(clipped, 0.0 if zero_point is None else zero_point.unsqueeze(-1), levels)
        grad_scale = sum_per_scale(codes.sub_(subtracted).mul_(grad), scale)
        grad_zero = None if zero_point is None else -scale * sum_per_scale(grad - inside, scale)
        grad_weight = inside.mul_(start.unsqueeze(-1)).view_as(weight)
        return grad_weight, grad_scale, grad_zero, None, None, None
