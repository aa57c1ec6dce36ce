"""A and B as fixed-point numbers, so that their product is the same number on every device.

The codes are round(Phi + c B A). A sum of floats depends on the order of its terms, and the order differs between CPU,
GPU, tile sizes and library versions; wherever the sum lies next to a rounding tie, so would the code, and an adapter
that was trained here would give another integer there. So the forward rounds the factors first: every column of A, and
every row of c B, to integers times one power of two,

    A~[:, i] = 2^e_i n,   B~[j, :] = 2^f_j m,      |n|, |m| <= 2^k,   k = min(11, floor((24 - ceil(log2 R)) / 2))

Every partial sum of (B~ A~)[j, i] is then an integer below 2^24 times 2^(e_i + f_j), which fp32 holds exactly: no order
of summation, fused multiply-add or tensor core (k <= 11 bits fit in fp16) can change it. k is 9 at rank 32 and 64: an
error of at most 2^-9 of a column's largest entry; with random factors, A B is off by 0.3 % of its own size (root mean
square), 0.003 grid steps where it moves weights by one (a test holds it below 0.5 %). The gradient passes
straight through to the fp32 masters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Slices whose largest entry is outside 2^[-40, 60] keep that exponent: no product of steps is then subnormal (a GPU may
# flush those to zero) or infinite, and anything below 2^-40 grid steps is as good as zero.
_MIN_EXPONENT, _MAX_EXPONENT = 127 - 40, 127 + 60


class Factors(NamedTuple):
    """A~ (R, in) and B~ (out, R), fp32, with c = lora_alpha / r inside B~, and in what units their product is.

    units: fp32 (out, groups), grid steps a unit of B~ A~ (`reference.adapter_units`); None: it counts grid steps.
    """

    A: torch.Tensor
    B: torch.Tensor
    units: torch.Tensor | None = None

    def rows(self, rows: slice) -> Factors:
        """Select the factors of some output rows: A~ as it is, views of B~ (rows, R) and of the units."""
        return Factors(self.A, self.B[rows], None if self.units is None else self.units[rows])


def factor_bits(rank: int) -> int:
    """Compute k, the magnitude bits of the rounded factors: every partial sum over `rank` products fits in 24 bits."""
    return min(11, (24 - max(0, rank - 1).bit_length()) // 2)


def round_factors(A: torch.Tensor, B: torch.Tensor, c: float = 1.0) -> Factors:
    """Round lora_A (R, in) and c lora_B (out, R), any float dtype, to A~ and B~ (see above); NaN and infinity stay."""
    bits = factor_bits(A.shape[0])
    return Factors(_fixed_point(A.float(), 0, bits), _fixed_point(B.float() * c, 1, bits))


def optional_factors(
    A: torch.Tensor | None, B: torch.Tensor | None, c: float, units: torch.Tensor | None = None
) -> Factors | None:
    """Round the factors of an adapter (`round_factors`); None where there is none (A or B is None)."""
    return None if A is None or B is None else round_factors(A, B, c)._replace(units=units)


def _fixed_point(values: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """Round fp32 values, ties to even, to multiples of a power of two that is shared along `dim`."""
    if values.numel() == 0:
        return values
    peak = values.abs().amax(dim, keepdim=True)
    exponent = (peak.view(torch.int32) >> 23).clamp_(_MIN_EXPONENT, _MAX_EXPONENT)  # peak < 2^(exponent - 126)
    step = ((exponent + (1 - bits)) << 23).view(torch.float32)
    return (values / step).round_().mul_(step)
