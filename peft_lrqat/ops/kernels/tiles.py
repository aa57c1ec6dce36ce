"""What the kernels share. A program works on a tile of W: `BM` output rows by up to `BN` columns of *one* group, so one
scale serves each row of the tile, whatever the granularity:

    group g = columns [g L, (g + 1) L)      L = in (per channel, per tensor) or group_size
    tile (m, n): rows [m BM, (m + 1) BM), columns [g L + t BN, ...), at most to the group's end
                 g, t = divmod(n, tiles a group)

A stack of experts (`ops/experts.py`) is cut expert by expert, so that every tile is one expert's; m counts on through
the experts, and a kernel that works on a stack is given `bounds`, which say whose tokens are where.

All arithmetic is that of `ops/reference.py`, operation for operation, in fp32: codes and W^ are equal bit for bit.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..stored_base import BaseFormat

#: Whether Triton interprets kernels on the CPU. There, products of bf16 are wrong and conversion to it truncates.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def bf16_bits(values):
    """Round fp32 to bf16's 8 significant bits, ties to even: still fp32, and exact in bf16. NaN may change."""
    bits = values.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def as_stored(values, pointer):
    """Round fp32 values to the dtype that `pointer` points to; still fp32."""
    if pointer.dtype.element_ty == tl.float32:
        return values
    elif INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        return tl.where(values == values, bf16_bits(values), values)
    else:
        return values.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def magnitude_bits(x):
    """Make int32 of fp32 that have the order of magnitudes; NaN is larger than infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest_magnitude(x):
    """Find the largest magnitude of each row of fp32 (BM, BN), as the bits of it: NaN is larger than infinity."""
    return tl.max(magnitude_bits(x), 1)


@triton.jit
def store(pointer, values, ok, FULL: tl.constexpr):
    """Store fp32 values where `ok`, rounded once to what `pointer` points to."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        values = tl.where(values == values, bf16_bits(values), values)
    if FULL:
        tl.store(pointer, values.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer, values.to(pointer.dtype.element_ty), mask=ok)


@triton.jit
def round_half_even(z):
    """Round as torch.round, for |z| < 2^22: adding 1.5 * 2^23 leaves no fraction bits. Larger z keep their order."""
    return (z + 12582912.0) - 12582912.0


@triton.jit
def clip(z, BITS: tl.constexpr):
    """Cut fp32 levels to `grid.code_range` of BITS bits; NaN stays NaN."""
    return tl.clamp(z, -1.0 * (1 << (BITS - 1)), 1.0 * (1 << (BITS - 1)) - 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tile_columns(n, GROUP: tl.constexpr, BN: tl.constexpr):
    """Return the column indices (BN,) of tile `n`, whether each belongs to it, its group, and its first column."""
    tiles_a_group: tl.constexpr = (GROUP + BN - 1) // BN
    group = n // tiles_a_group
    within = (n % tiles_a_group) * BN + tl.arange(0, BN)
    return group * GROUP + within, within < GROUP, group, group * GROUP + (n % tiles_a_group) * BN


@triton.jit
def tile_rows(m, out_features, bounds, BM: tl.constexpr):
    """Return the row indices (BM,) of tile `m`, whether each belongs to it, and whose rows these are.

    `bounds` is None for a single weight; `out_features` are one expert's.
    """
    if bounds is None:
        j = m * BM + tl.arange(0, BM)
        return j, j < out_features, 0
    else:
        tiles = tl.cdiv(out_features, BM)
        expert = m // tiles
        within = (m - expert * tiles) * BM + tl.arange(0, BM)
        return expert * out_features + within, within < out_features, expert


@triton.jit
def tokens_of(expert, tokens, bounds):
    """Return where the tokens of an expert begin and end; without `bounds`, all are the one weight's."""
    if bounds is None:
        return 0, tokens
    else:
        return tl.load(bounds + expert), tl.load(bounds + expert + 1)


@triton.jit
def load(pointer, ok, FULL: tl.constexpr):
    """Load where `ok`, 0 elsewhere; FULL tiles need no mask."""
    if FULL:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=ok, other=0)


@triton.jit
def stored_levels(
    base, j, i, first, row_ok, column_ok, words, BITS: tl.constexpr, DOWNCAST: tl.constexpr, FULL: tl.constexpr
):
    """Load Phi (BM, BN): the stored base in centred grid steps, fp32."""
    row = base + j.to(tl.int64)[:, None] * words
    ok = row_ok[:, None] & column_ok[None, :]
    if DOWNCAST == "fx8":
        # (n + 1/2) / 2^(8 - BITS); nothing is rounded, so it is one operation
        return tl.fma(load(row + i[None, :], ok, FULL).to(tl.float32), 1.0 / (1 << (8 - BITS)), 0.5 / (1 << (8 - BITS)))
    elif DOWNCAST == "int":
        MASK: tl.constexpr = (1 << BITS) - 1
        if FULL and 32 % BITS == 0:  # whole words: each is read once and opened in registers
            CODES: tl.constexpr = 32 // BITS
            WORDS: tl.constexpr = i.shape[0] // CODES
            word = first // CODES + tl.arange(0, WORDS)
            packed = tl.load(row + word[None, :])
            opened = packed[:, :, None] >> (tl.arange(0, CODES) * BITS)[None, None, :]
            code = tl.reshape(opened, (j.shape[0], i.shape[0])) & MASK
        elif FULL and i.shape[0] % 32 == 0:  # 32 codes are BITS words; a code may reach into the next one
            THIRTY_TWOS: tl.constexpr = i.shape[0] // 32
            bit = tl.arange(0, 32) * BITS
            shift = (bit & 31).to(tl.uint32)[None, None, :]
            at = first // 32 * BITS + tl.arange(0, THIRTY_TWOS) * BITS
            low = tl.zeros((j.shape[0], THIRTY_TWOS, 32), dtype=tl.uint32)
            high = low
            for k in tl.static_range(BITS):
                word = tl.load(row + (at + k)[None, :]).to(tl.uint32, bitcast=True)[:, :, None]
                low = tl.where(((bit >> 5) == k)[None, None, :], word, low)
                high = tl.where(((bit >> 5) == k - 1)[None, None, :], word, high)
            reaches = (shift + BITS) > 32
            opened = (low >> shift) | tl.where(reaches, high << ((32 - shift) & 31), 0)
            code = tl.reshape(opened, (j.shape[0], i.shape[0])).to(tl.int32) & MASK
        else:
            bit = i * BITS
            word, shift = bit >> 5, bit & 31
            low = load(row + word[None, :], ok, FULL).to(tl.uint32, bitcast=True) >> shift[None, :].to(tl.uint32)
            if 32 % BITS != 0:  # a code may reach into the next word
                reaches = (shift + BITS) > 32
                high = tl.load(row + word[None, :] + 1, mask=ok & reaches[None, :], other=0)
                low = low | (high.to(tl.uint32, bitcast=True) << ((32 - shift) & 31)[None, :].to(tl.uint32))
            code = (low & MASK).to(tl.int32)
        return (code - (1 << (BITS - 1))).to(tl.float32)
    else:
        n = load(row + i[None, :], ok, FULL)
        if DOWNCAST == "bf16":
            return n.to(tl.bfloat16, bitcast=True).to(tl.float32)
        elif DOWNCAST == "fp16":
            return n.to(tl.float16, bitcast=True).to(tl.float32)
        else:
            return n.to(tl.float32, bitcast=True)


@triton.jit
def a_tile(factors, a_int, k, i, k_ok, column_ok, in_features, EVEN: tl.constexpr):
    """Load a_int[k, i] (BR, BN), fp16."""
    pointer = (factors + a_int).to(tl.pointer_type(tl.float16))
    return load(pointer + k[:, None] * in_features + i[None, :], k_ok[:, None] & column_ok[None, :], EVEN)


@triton.jit
def first_a(factors, a_int, a_step, expert, i, column_ok, in_features, RANK: tl.constexpr, FULL: tl.constexpr):
    """Load what `rounded_levels` needs of A for some columns: the first rows of a_int (BR, BN), and a_step (BN,).

    A program that works on tiles one below the other loads it once.
    """
    if RANK == 0:
        return i, i  # nobody reads them
    else:
        BR: tl.constexpr = 16 if RANK <= 16 else 32
        k = tl.arange(0, BR)
        a = a_tile(factors, a_int, expert * RANK + k, i, k < RANK, column_ok, in_features, FULL and RANK % BR == 0)
        return a, load(factors + a_step + expert * in_features + i, column_ok, FULL)


@triton.jit
def b_tile(factors, b_int, j, k, row_ok, k_ok, RANK: tl.constexpr, EVEN: tl.constexpr):
    """Load b_int[j, k] (BM, BR), fp16."""
    pointer = (factors + b_int).to(tl.pointer_type(tl.float16))
    return load(pointer + j[:, None] * RANK + k[None, :], row_ok[:, None] & k_ok[None, :], EVEN)


@triton.jit
def rounded_levels(
    base,
    factors,
    scale_stride,
    units,
    b_step,
    a_int,
    b_int,
    a,
    a_steps,
    expert,
    j,
    i,
    group,
    first,
    row_ok,
    column_ok,
    words,
    in_features,
    RANK: tl.constexpr,
    BITS: tl.constexpr,
    DOWNCAST: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    FULL: tl.constexpr,
):
    """Build round(Phi + units B~ A~) (BM, BN) before clipping, fp32. RANK 0: no adapter.

    `factors` and the offsets in it: `prepare.py`; `a` and `a_steps`: `first_a`. With BY_CHANNEL, launch it without
    fused operations.
    """
    z = stored_levels(base, j, i, first, row_ok, column_ok, words, BITS, DOWNCAST, FULL)
    if RANK > 0:
        BR: tl.constexpr = 16 if RANK <= 16 else 32
        EVEN: tl.constexpr = FULL and RANK % BR == 0
        product = tl.zeros((j.shape[0], i.shape[0]), dtype=tl.float32)
        for start in tl.static_range(0, RANK, BR):
            k = start + tl.arange(0, BR)
            k_ok = k < RANK
            b = b_tile(factors, b_int, j, k, row_ok, k_ok, RANK, EVEN)
            if start > 0:
                a = a_tile(factors, a_int, expert * RANK + k, i, k_ok, column_ok, in_features, EVEN)
            product = tl.dot(b, a, product)  # integers below 2^24: exact in any order
        # the steps are powers of two: the product with the units is rounded, if there are any, and nothing else
        steps = load(factors + b_step + j, row_ok, FULL)
        if BY_CHANNEL:
            steps = steps * load(factors + units + j * scale_stride + group, row_ok, FULL)
        z = z + product * a_steps[None, :] * steps[:, None]
    return round_half_even(z)


@triton.jit
def adapter_step(scale, factors, scale_stride, step, j, group, row_ok, BY_CHANNEL: tl.constexpr, FULL: tl.constexpr):
    """Load what a unit of B~ A~ moves the weights of a row by (BM,): its scale, or the largest of the row."""
    if BY_CHANNEL:
        return load(factors + step + j, row_ok, FULL)
    else:
        return load(scale + j * scale_stride + group, row_ok, FULL)


#: Programs that keep a GPU busy; with fewer, no program works on several tiles.
ENOUGH_PROGRAMS = 512


class Tiling(NamedTuple):
    """How an (out, in) weight is cut into tiles."""

    columns: int  # tiles along a row
    rows: int  # tiles along a column
    group: int  # L
    BM: int
    BN: int
    loop: int  # tiles, one below the other, that one program works on
    full: bool  # whether every tile lies inside of the weight
    stack: int  # experts that are cut so, one after the other

    @property
    def total(self) -> int:
        """Number of tiles, of all experts."""
        return self.columns * self.rows * self.stack

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of programs: the columns first, so that neighbours share rows of the base."""
        return self.columns, ceil_div(self.rows, self.loop) * self.stack

    def constants(self, fmt: BaseFormat, rank: int, by_channel: bool) -> dict[str, Any]:
        """Name the constants that kernels which call `rounded_levels` on these tiles take first."""
        shape = {"BM": self.BM, "BN": self.BN, "FULL": self.full}
        number = {"RANK": rank, "BITS": fmt.bits, "DOWNCAST": fmt.downcast, "BY_CHANNEL": by_channel}
        return {"GROUP": self.group, **number, **shape}


@functools.lru_cache(maxsize=1024)
def tiling(rows: int, in_features: int, groups: int, BM: int = 32, loops: bool = True, stack: int = 1) -> Tiling:
    """Cut a (rows, in) weight, or each of a stack of such, with `groups` scales a row into tiles.

    A program that works on several tiles loads the next while it computes one, which was the fastest of what was tried
    on an H100. But there must be programs enough.
    """
    group = in_features // groups
    BN = next((n for n in (128, 64, 32) if group % n == 0), max(16, min(128, power_of_2(group))))
    columns, of_rows = groups * ceil_div(group, BN), ceil_div(rows, BM)
    loop = next(
        (n for n in (8, 4, 2) if loops and rows % (BM * n) == 0 and columns * of_rows * stack // n >= ENOUGH_PROGRAMS),
        1,
    )
    return Tiling(columns, of_rows, group, BM, BN, loop, rows % BM == 0 and group % BN == 0, stack)


def scale_stride(scales: tuple[int, ...]) -> int:
    """Count the elements from the scales of one row to those of the next: 0 where all rows share them."""
    return 0 if scales[0] == 1 else scales[1]


# triton.cdiv and triton.next_power_of_2, which on the host cost as much as a launch


def ceil_div(a: int, b: int) -> int:
    """Divide, rounding up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Find the smallest power of two that is not smaller than n (n > 0)."""
    return 1 << (n - 1).bit_length()
