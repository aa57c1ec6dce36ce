"""The step of `LowBitAdamW` on packed codes in one launch; the reference is `ops/reference_step.py`.

A program walks through blocks of 256 columns of BM rows: whole words for every width of code, the blocks that share a
number of the 8-bit state, and whole Philox evaluations (four columns each). So nothing is shared between programs, and
every array is updated in place. What all blocks of a row have in common it computes once: the step is bound by
instructions (`arithmetic.py`), of which a weight takes about a hundred.

Codes, state and scales are the reference's bit for bit: the random words have its counters, the operations its order,
every one of them is rounded on its own (a launch without contraction to fused multiply-adds), and quotients and roots
are IEEE's. What the step takes from torch are a few scalars (beta^t) and, in the factored state, the mean of g^2.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...rounding import SHARED_BITS
from ..latent import PARTS, REACH
from ..reference_step import BLOCK, CUBES, SECOND_MOMENT, SMALLEST, Corrections, Rule
from .arithmetic import (
    cube_root_floor,
    dither,
    open_word,
    quotient,
    random_words,
    square_root,
    to_float,
    to_int,
    to_int8,
    uniform,
)
from .launch import Launch, launched
from .tiles import ceil_div, magnitude_bits, round_half_even, scale_stride


class Tile(NamedTuple):
    """How many rows a program has, how many blocks of columns it walks through at most, and by how many warps."""

    rows: int
    blocks: int
    warps: int


TILE = Tile(8, 4, 4)
#: The bits of infinity, which those of NaN are above.
INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def _load_codes(row, block, i, row_ok, column_ok, words, BITS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr):
    """Load the centred codes (BM, BLOCK), fp32, of the rows that `row` (BM, 1) points to."""
    if 32 % BITS == 0:  # each word is read once and opened in registers
        CODES: tl.constexpr = 32 // BITS
        word = block * (BLOCK // CODES) + tl.arange(0, BLOCK // CODES)
        packed = tl.load(row + word[None, :], mask=row_ok[:, None] & (word < words)[None, :], other=0)
        opened = open_word(packed[:, :, None], tl.arange(0, CODES)[None, None, :], BITS)
        return tl.reshape(opened, (BM, BLOCK))
    else:
        MASK: tl.constexpr = (1 << BITS) - 1
        bit = i * BITS
        word, shift = bit >> 5, bit & 31
        ok = row_ok[:, None] & column_ok[None, :]
        low = tl.load(row + word[None, :], mask=ok, other=0).to(tl.uint32, bitcast=True)
        reaches = (shift + BITS) > 32  # into the next word
        high = tl.load(row + word[None, :] + 1, mask=ok & reaches[None, :], other=0).to(tl.uint32, bitcast=True)
        both = (low >> shift[None, :].to(tl.uint32)) | (high << ((32 - shift) & 31)[None, :].to(tl.uint32))
        return to_float((both & MASK).to(tl.int32), 1 << (BITS - 1))


@triton.jit
def _store_codes(row, unsigned, block, row_ok, words, BITS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr):
    """Store what `_load_codes` reads; `unsigned`: int32 (BM, BLOCK), codes + 2^(BITS-1), 0 past the end of the row.

    Bits of a word do not overlap, so their sum is the word.
    """
    if 32 % BITS == 0:
        CODES: tl.constexpr = 32 // BITS
        shifted = tl.reshape(unsigned, (BM, BLOCK // CODES, CODES)) << (tl.arange(0, CODES) * BITS)[None, None, :]
        word = block * (BLOCK // CODES) + tl.arange(0, BLOCK // CODES)
        tl.store(row + word[None, :], tl.sum(shifted, 2), mask=row_ok[:, None] & (word < words)[None, :])
    else:  # 32 codes make BITS words; a code on the edge gives its low bits to one and its high bits to the next
        chunks = tl.reshape(unsigned, (BM, BLOCK // 32, 32))
        first = (block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)) * BITS
        for n in tl.static_range(BITS):
            shift = tl.arange(0, 32) * BITS - 32 * n
            left = tl.where((shift >= 0) & (shift < 32), shift, 0)[None, None, :]
            right = tl.where((shift < 0) & (shift > -BITS), -shift, 0)[None, None, :]
            here = ((shift > -BITS) & (shift < 32))[None, None, :]
            part = tl.sum(tl.where(here, (chunks << left) >> right, 0), 2)
            tl.store(row + (first + n)[None, :], part, mask=row_ok[:, None] & (first + n < words)[None, :])


@triton.jit
def _load_scale(
    scale, scale_stride, wide, block, i, row_ok, inside, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Load the scales of BM rows and one block of columns: fp32 (BM, 1) or (BM, BLOCK)."""
    if GROUP == 0:  # one scale a row
        s = tl.load(scale + wide * scale_stride, mask=row_ok, other=1.0)[:, None]
    elif GROUP % BLOCK == 0:
        s = tl.load(scale + wide * scale_stride + block * BLOCK // GROUP, mask=row_ok, other=1.0)[:, None]
    else:
        s = tl.load(scale + wide[:, None] * scale_stride + (i // GROUP)[None, :], mask=inside, other=1.0)
    return s


@triton.jit
def _in_grid_steps(pace, s, GRID_UNIT: tl.constexpr):
    """Make a rate the grid steps of each scale that it goes down, fp32, unless it counts those already."""
    pace = tl.zeros_like(s) - pace  # downhill
    return tl.where(s < 0, -pace, pace) if GRID_UNIT else tl.div_rn(pace, s)


@triton.jit
def _encode_second_moment(v, root, dither, inside):
    """Encode v, whose root is known, as `reference_step.encode_second_moment`: uint8 (BM, BLOCK) and int16 (BM,)."""
    low = root.to(tl.int32, bitcast=True) >> 19
    below = (low << 19).to(tl.float32, bitcast=True)
    above = ((low + 1) << 19).to(tl.float32, bitcast=True)
    below, above = below * below, above * above
    k = tl.where(inside, low + (dither * (above - below) < v - below).to(tl.int32), 0)
    top = tl.max(k, 1)
    return tl.maximum(k - top[:, None] + 255, 0).to(tl.uint8), top.to(tl.int16)


@triton.jit
def _encode_momentum(m, dither, inside, CUBES: tl.constexpr, SMALLEST: tl.constexpr):
    """Encode as `reference_step.encode_momentum`: int8 (BM, BLOCK) and fp32 (BM,), NaN if one of the block is."""
    m = tl.where(inside, m, 0.0)
    unit = tl.max(magnitude_bits(m), 1).to(tl.float32, bitcast=True) * (1.0 / CUBES)
    one = tl.full(unit.shape, 1.0, tl.float32)
    size = tl.abs(m) * tl.where(unit >= SMALLEST, tl.div_rn(one, unit), 0.0)[:, None]
    # a root that may be too small by one, which cubes of integers put right; 126 are the most
    k = tl.minimum(cube_root_floor(size), 125.0)
    next = k + 1.0
    k = k + (next * next * next <= size).to(tl.float32)
    square = k * k
    below = square * k
    width = tl.fma(square + k, 3.0, 1.0)  # (k + 1)^3 - k^3
    k = k + (dither * width < size - below).to(tl.float32)
    sign = m.to(tl.int32, bitcast=True) & -2147483648
    signed = (k.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return to_int8(signed), unit


@launched
@triton.jit
def _update_kernel(
    packed,
    scale,
    stream,
    grad,
    m_values,
    m_unit,
    v_values,
    v_top,
    v_columns,
    v_mean,
    lr,
    correction1,
    correction2,
    poison,
    latent,
    scale_before,
    norms,
    scale_stride,
    rows,
    columns,
    words,
    blocks,
    beta1,
    new1,
    beta2,
    new2,
    eps,
    weight_decay,
    feedback,
    BITS: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    GROUP: tl.constexpr,
    GRID_UNIT: tl.constexpr,
    FEEDBACK: tl.constexpr,
    SHARED: tl.constexpr,
    CUBES: tl.constexpr,
    SMALLEST: tl.constexpr,
    DECAYS: tl.constexpr,
    FAR_FROM_ZERO: tl.constexpr,
    PARTS: tl.constexpr,
    REACH: tl.constexpr,
    FULL: tl.constexpr,
    NEAR: tl.constexpr,
    BLOCKS: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    chunks = (blocks + BLOCKS - 1) // BLOCKS
    first = program % chunks * BLOCKS
    j = (program // chunks) * BM + tl.arange(0, BM)
    row_ok = tl.full((BM,), 1, tl.int1) if FULL else j < rows
    wide = j.to(tl.int64)
    row = packed + wide[:, None] * words

    rate, c1, c2 = tl.load(lr), tl.load(correction1), tl.load(correction2)
    pace_of_all = rate
    if m_values is not None:
        pace_of_all = tl.div_rn(rate, c1)
        factor = tl.div_rn(c1 * feedback, tl.where(rate > 0, rate, float("inf")))
    if not DECAYS:  # what is left of the decay: a rate that is not finite breaks the update
        pace_of_all += rate * 0.0
    if GROUP == 0:
        s = tl.load(scale + wide * scale_stride, mask=row_ok, other=1.0)[:, None]
        s_before = s
        if scale_before is not None:
            s_before = tl.load(scale_before + wide * scale_stride, mask=row_ok, other=1.0)[:, None]
        pace = _in_grid_steps(pace_of_all, s_before, GRID_UNIT)
    if v_columns is not None:
        of_rows = tl.load(v_values + wide, mask=row_ok, other=0.0)
        of_rows = tl.sqrt_rn(tl.div_rn(of_rows, tl.load(v_mean) + tl.zeros_like(of_rows))) * c2
    worst = 0
    squares = tl.zeros((BM,), dtype=tl.float32)

    for block in range(first, tl.minimum(first + BLOCKS, blocks)):
        i = block * BLOCK + tl.arange(0, BLOCK)
        column_ok = tl.full((BLOCK,), 1, tl.int1) if FULL else i < columns
        inside = row_ok[:, None] & column_ok[None, :]
        at = wide[:, None] * columns + i[None, :]
        at_block = wide * blocks + block

        # everything is read before anything is written: threads may hold copies of what others write
        q = _load_codes(row, block, i, row_ok, column_ok, words, BITS, BM, BLOCK)
        g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
        random = random_words(stream, j, block, NEAR, BM, BLOCK)
        if GROUP != 0:
            s = _load_scale(scale, scale_stride, wide, block, i, row_ok, inside, GROUP, BLOCK)
            s_before = s
            if scale_before is not None:
                s_before = _load_scale(scale_before, scale_stride, wide, block, i, row_ok, inside, GROUP, BLOCK)
            pace = _in_grid_steps(pace_of_all, s_before, GRID_UNIT)
        x = q
        if latent is not None:
            x = q + tl.load(latent + at, mask=inside, other=0).to(tl.float32) * (1.0 / PARTS)

        m = g
        if m_values is not None:
            m = tl.load(m_values + at, mask=inside, other=0).to(tl.float32)
            if m_unit is not None:
                m = m * m * m * tl.load(m_unit + at_block, mask=row_ok, other=0.0)[:, None]

        if v_columns is not None:
            root = of_rows[:, None] * tl.sqrt_rn(tl.load(v_columns + i, mask=column_ok, other=0.0))[None, :]
        else:
            v = tl.load(v_values + at, mask=inside, other=0)
            if v_top is not None:
                top = tl.load(v_top + at_block, mask=row_ok, other=0).to(tl.int32)[:, None]
                root = (tl.maximum(v.to(tl.int32) + top - 255, 0) << 19).to(tl.float32, bitcast=True)
                v = root * root
            v = v * beta2 + g * g * new2
            root = square_root(v)
        tl.debug_barrier()

        if v_top is not None:
            v_codes, top = _encode_second_moment(v, root, dither(random, 0, 4, SHARED), inside)
            tl.store(v_values + at, v_codes, mask=inside)
            tl.store(v_top + at_block, top, mask=row_ok)
        elif v_columns is None:
            tl.store(v_values + at, v, mask=inside)

        denominator = (root if v_columns is not None else root * c2) + eps
        if m_values is None:
            adam = quotient(g, denominator, FAR_FROM_ZERO)
        elif FEEDBACK:
            m = m * beta1 + quotient(g, denominator, FAR_FROM_ZERO) * new1
            adam = m
        else:
            m = m * beta1 + g * new1
            adam = quotient(m, denominator, FAR_FROM_ZERO)
        move = adam * pace
        if DECAYS:
            move -= rate * weight_decay * x
        worst_here = tl.max(tl.max(tl.where(inside, magnitude_bits(move), 0), 1), 0)
        worst = tl.maximum(worst, worst_here)
        target = x + move
        if latent is None:
            rounded = q + tl.floor(move + uniform(random))
            if worst_here > INFINITE:  # one of them is NaN
                rounded = tl.where(rounded == rounded, rounded, 0.0)
            rounded = tl.clamp(rounded, QMIN, QMAX)
            kept = rounded
        else:
            if scale_before is not None:
                target = target * tl.div_rn(s_before, s)
            rounded = q + round_half_even(target - q)
            rounded = tl.clamp(tl.where(rounded == rounded, rounded, 0.0), QMIN, QMAX)
            left = tl.floor((target - rounded) * PARTS + uniform(random))
            left = tl.clamp(tl.where(left == left, left, 0.0), -127.0, 127.0)
            tl.store(latent + at, to_int8(left), mask=inside)
            kept = rounded + left * (1.0 / PARTS)
        unsigned = tl.where(inside, to_int(rounded, 1 << (BITS - 1)), 0)
        _store_codes(row, unsigned, block, row_ok, words, BITS, BM, BLOCK)

        if m_values is not None:
            if FEEDBACK:
                lost = tl.clamp(target, QMIN - REACH, QMAX + REACH, propagate_nan=tl.PropagateNan.ALL) - kept
                m = m + lost * (tl.where(s < 0, -factor, factor) if GRID_UNIT else factor * s)
            if m_unit is not None:
                m_codes, unit = _encode_momentum(m, dither(random, 4, 5, SHARED), inside, CUBES, SMALLEST)
                tl.store(m_values + at, m_codes, mask=inside)
                tl.store(m_unit + at_block, unit, mask=row_ok)
            else:
                tl.store(m_values + at, m, mask=inside)
        if norms is not None:
            squares += tl.sum(g * g, 1)

    tl.store(poison, float("nan"), mask=worst >= INFINITE)  # every program that does writes the same
    if norms is not None:
        tl.store(norms + program, tl.sqrt_rn(tl.sum(squares, 0)))


@launched
@triton.jit
def _finish_kernel(scale, stream, poison, scales, BLOCK: tl.constexpr):
    """Do what may not happen before all programs of `_update_kernel` are done: one program counts the stream on and,
    where an update was not finite, makes the scales NaN, and `poison` 0 again."""
    step, broken = tl.load(stream + 1), tl.load(poison)
    tl.debug_barrier()  # before another thread writes
    tl.store(stream + 1, step + 1)
    if broken != broken:
        for start in range(0, scales, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(scale + at, tl.full((BLOCK,), float("nan"), tl.float32), mask=at < scales)
        tl.store(poison, 0.0)


@functools.lru_cache(maxsize=1024)
def _launch(rows: int, words: int, scales: tuple[int, int], rule: Rule) -> Launch:
    grid, blocks, tile = rule.grid, ceil_div(rule.columns, BLOCK), TILE
    if rule.state == "fp32" or rows % tile.rows or rule.columns % BLOCK:  # or there are not enough registers
        tile = tile._replace(rows=4)
    return _update_kernel.launch(
        (ceil_div(rows, tile.rows) * ceil_div(blocks, tile.blocks),),
        scale_stride(scales),
        rows,
        rule.columns,
        words,
        blocks,
        float(rule.beta1),
        1.0 - rule.beta1,
        float(rule.beta2),
        1.0 - rule.beta2,
        float(rule.eps),
        float(rule.weight_decay),
        1 - 1 / rule.beta1 if rule.beta1 else 0.0,
        warps=tile.warps,
        fused=False,
        BITS=grid.code_bits,
        QMIN=float(grid.qmin),
        QMAX=float(grid.qmax),
        GROUP=0 if scales[1] == 1 else rule.columns // scales[1],
        GRID_UNIT=rule.lr_unit == "grid",
        FEEDBACK=rule.error_feedback,
        SHARED=SHARED_BITS,
        CUBES=CUBES,
        SMALLEST=SMALLEST,
        DECAYS=rule.weight_decay != 0,
        FAR_FROM_ZERO=rule.eps >= 2.0**-60,
        PARTS=PARTS,
        REACH=REACH if rule.latent_weights else 0.0,
        FULL=rows % tile.rows == 0 and rule.columns % BLOCK == 0,
        NEAR=max(1, min(4, tile.rows * BLOCK // (32 * tile.warps) // 4)),
        BLOCKS=tile.blocks,
        BM=tile.rows,
        BLOCK=BLOCK,
    )


@functools.lru_cache(maxsize=1024)
def _finish(scales: int) -> Launch:
    return _finish_kernel.launch((1,), scales, BLOCK=1024)


@functools.cache
def _poison(device: torch.device, stream: int) -> torch.Tensor:
    """Make 0, fp32, which is so again after every step: for all weights whose steps follow on one another."""
    return torch.zeros((), dtype=torch.float32, device=device)


def low_bit_update(
    packed: torch.Tensor,
    scale: torch.Tensor,
    stream: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, torch.Tensor],
    lr: torch.Tensor,
    corrections: Corrections,
    rule: Rule,
    scale_before: torch.Tensor | None = None,
    norms: bool = False,
) -> torch.Tensor | None:
    """Do what `reference_step.low_bit_update` does, bit for bit, but for the parts that `norms` are of; never waits for
    the device.

    What is updated must be contiguous, and `lr` must lie on the device. The weight is one row chunk here.
    """
    rows, words = packed.shape
    if not rows or not rule.columns:
        stream[1].add_(1)
        return scale.new_zeros(0) if norms else None
    device = packed.device
    poison = _poison(device, torch._C._cuda_getCurrentRawStream(device.index) if packed.is_cuda else 0)
    momentum = rule.momentum
    v = state[SECOND_MOMENT[rule.state]]
    launch = _launch(rows, words, tuple(scale.shape), rule)
    of_parts = torch.empty(launch.grid, dtype=torch.float32, device=device) if norms else None
    launch(
        packed,
        scale,
        stream,
        grad.contiguous(),
        None if momentum is None else state.get(momentum, state.get(f"{momentum}_codes")),
        state.get(f"{momentum}_unit"),
        v,
        state.get("exp_avg_sq_top"),
        state.get("exp_avg_sq_columns"),
        state.get("exp_avg_sq_mean"),
        lr,
        *corrections,
        poison,
        state.get("latent_codes"),
        scale_before,
        of_parts,
    )
    _finish(scale.numel())(scale, stream, poison)
    torch.autograd.graph.increment_version((packed, scale, stream))  # which torch counts of its own writes
    return of_parts
