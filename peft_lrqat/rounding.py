"""Stochastic rounding of codes, and the counter-based random numbers behind it.

The numbers come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the
generator of cuRAND and of Triton's `tl.philox`. There is no generator state: the number for one weight is a function of

    key      64 bits, of the parameter (a hash of the configuration's seed and the module's name)
    step     how often this parameter has been rounded before
    row      of the weight, 0 .. out - 1
    column   of the weight, 0 .. in - 1

so it does not depend on chunking, on the device, on other parameters, or on the data-parallel rank. One evaluation
with the counter (column // 4, row, step, 0) gives four 32-bit words, for four neighbouring columns:

    word   | 31 ............................... 9 | 8 ....... 0 |
             k, 23 bits: u = (k + 1/2) 2^-23        spare: dither of the optimizer's 8-bit state, which
             |          21 ............... 9 |       takes these 13 bits of u as its low ones

u is exact in fp32 and lies strictly between 0 and 1, so floor(q + d + u) is q wherever d = 0.
"""

from __future__ import annotations

import hashlib

import torch

from .grid import Grid

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

#: Low bits of a word that `uniform` leaves to others.
SPARE_BITS = 9
#: Low bits of u's that a dither has below its spare ones.
SHARED_BITS = 13


def stream_key(seed: int, name: str) -> int:
    """Hash a seed and a parameter's name to its 64-bit key, a signed integer that fits torch.int64."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _mul_hi_lo(value: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    # int64 wraps modulo 2^64, and so holds the product's bits; the mask undoes the shift's sign extension
    product = value * multiplier
    return (product >> 32) & _MASK, product & _MASK


def philox(
    c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw four 32-bit words from a 128-bit counter and a 64-bit key: Philox4x32-10.

    Args:
        c0, c1, c2, c3: int64 tensors that broadcast together, each in [0, 2^32).
        key: int64, one element.

    Returns:
        Four int64 tensors of the broadcast shape, each in [0, 2^32).
    """
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(ROUNDS):
        hi0, lo0 = _mul_hi_lo(c0, _MULTIPLIERS[0])
        hi1, lo1 = _mul_hi_lo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(rows: torch.Tensor, columns: int, step: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Draw the words of some rows of a weight.

    Args:
        rows: int64 (n,), row numbers.
        columns: in_features.
        step, key: int64, one element each.

    Returns:
        int64 (n, columns), each in [0, 2^32).
    """
    blocks = torch.arange(-(-columns // 4), device=rows.device).view(1, -1)
    zero = torch.zeros((), dtype=torch.int64, device=rows.device)
    words = philox(blocks, rows.view(-1, 1), step & _MASK, zero, key)
    return torch.stack(words, dim=-1).view(rows.shape[0], -1)[:, :columns]


def uniform(words: torch.Tensor) -> torch.Tensor:
    """Take the upper 23 bits of each word (int64) as fp32 in (0, 1): the odd multiples of 2^-24."""
    return ((words >> SPARE_BITS).float() + 0.5) * 2.0**-23


def spare_dither(words: torch.Tensor, low: int, width: int) -> torch.Tensor:
    """Make fp32 in (0, 1) of `width` spare bits of each word (int64), from bit `low` on, and the low bits of `uniform`
    below them: the middle of their cell.

    A dither of the spare bits alone would lose every change below half its own step, in every step again. Those of u's
    cost nothing: together the two weigh so little that the dither and u correlate by less than 2^-12.
    """
    spare = (words >> low) & ((1 << width) - 1)
    bits = (spare << SHARED_BITS) | ((words >> SPARE_BITS) & ((1 << SHARED_BITS) - 1))
    return (bits.float() + 0.5) * 2.0 ** -(width + SHARED_BITS)


def round_stochastically(codes: torch.Tensor, move: torch.Tensor, u: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Compute clip(q + floor(d + u)), DQT's SR(q + d) (arXiv 2412.04787, eq. 1): up with probability equal to the
    fraction.

    The integer stays out of the floating-point sum: d + u is exact to 2^-24 whatever q is, and d = 0 changes nothing.

    Args:
        codes: (...) integers in any dtype, grid steps.
        move: (...) fp32, how far to go, grid steps.
        u: (...) fp32, uniform in (0, 1).

    Returns:
        fp32 (...), integers in [qmin, qmax]. Where `move` is not finite, 0: see `poison`.
    """
    target = codes.float() + torch.floor(move + u)
    return torch.nan_to_num(target, nan=0.0).clamp(grid.qmin, grid.qmax)


def poison(scale: torch.Tensor, move: torch.Tensor) -> None:
    """Make `scale` NaN if `move` holds NaN or infinite values, without asking the device.

    Integers cannot be NaN. A float weight would be NaN after such an update, and the loss with it; so it is here.
    """
    scale.add_((move * 0).sum())
