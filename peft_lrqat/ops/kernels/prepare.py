"""The small operands of a layer in one launch: the scale as it is stored, and A and B as fixed point.

They go into one buffer, because on small batches a step waits for Python, and every tensor costs it some microseconds:

    buffer (fp32):  | s (rows x groups) | units (rows x groups) | u (rows) | t (rows) |
                    | a_step (in) | b_step (out) | a_int (R x in, fp16) | b_int (out x R, fp16) |

Of a stack of experts, `rows` and `out` are those of all; a_step and a_int are there for each expert.

A~ = a_int * a_step and B~ = b_int * b_step as `ops/factors.py` defines them. The units of B~ A~, and t and u, the
largest |s0| and |s| of a row, are there by channel only, where one shift moves all scales of a row.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..factors import _MAX_EXPONENT, _MIN_EXPONENT, factor_bits
from ..reference import _MOST_UNITS, by_channel
from .launch import Launch, launched
from .tiles import bf16_bits, ceil_div, power_of_2, round_half_even, scale_stride, store

SCALE_BLOCK = 1024
SNAPS = {"auto": 0, "bf16": 1, "fp16": 2, "fp32": 3}


class Offsets(NamedTuple):
    """Scalars that every kernel takes: elements of the scale, and of the buffer (fp32, for a_int and b_int too)."""

    scale_stride: int  # from row to row; 0 where one scale serves all
    units: int = 0
    step: int = 0  # of u; t follows
    a_step: int = 0
    b_step: int = 0
    a_int: int = 0
    b_int: int = 0

    @property
    def by_channel(self) -> bool:
        """Whether B~ A~ counts the largest step of a row."""
        return self.units > 0


def layout(stride: int, scales: int, rows: int, cols: int, rank: int, channels: bool) -> tuple[Offsets, int]:
    """Lay out the buffer; also returns its size, in fp32 elements. `cols` are those of all experts.

    Every part starts at a multiple of 64 bytes, so that loads can be wide.
    """
    starts = [0]
    extra = (scales, 2 * rows) if channels else (0, 0)
    for size in (scales, *extra, cols, rows, ceil_div(rank * cols, 2), ceil_div(rank * rows, 2)):
        starts.append(starts[-1] + ceil_div(size, 16) * 16)
    units, step = starts[1:3] if channels else (0, 0)
    return Offsets(stride, units, step, *starts[3:7]), starts[7]


class Prepared(NamedTuple):
    """What the kernels read in addition to the base."""

    scale: torch.Tensor  # fp32; the first rows x groups elements are s, weight units per grid step
    buffer: torch.Tensor | None  # None without an adapter
    offsets: Offsets
    rank: int
    a_low: torch.Tensor | None = None  # A~ (R, in) in the compute dtype, one expert's after the other
    b_low: torch.Tensor | None = None  # B~ (out, R), or s B~ (by channel: u B~), in the compute dtype

    def row_steps(self, scale0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and the present scale of whole rows, of `scale0`'s shape; by channel t and u, (rows, 1).

        The latter may be a longer tensor that begins with it, where there is one scale a row or a tensor.
        """
        if not self.offsets.by_channel:
            return scale0, self.scale
        rows, step = scale0.shape[0], self.offsets.step
        u, t = self.scale[step : step + 2 * rows].view(2, rows, 1)
        return t, u


@triton.jit
def snap(s, SNAP: tl.constexpr):
    """Snap as `grid.snap_magnitude` does, bit for bit; NaN stays NaN."""
    if SNAP == 0:  # exact in bf16 and fp16
        kept = tl.clamp(s, 5.9604644775390625e-08, 65280.0)
        small = round_half_even(kept * 16777216.0) * 5.9604644775390625e-08
        kept = tl.where(kept < 7.62939453125e-06, small, bf16_bits(kept))
    elif SNAP == 1:
        kept = bf16_bits(tl.maximum(s, 1.1754943508222875e-38))
    elif SNAP == 2:
        kept = tl.clamp(s, 5.9604644775390625e-08, 65504.0).to(tl.float16).to(tl.float32)
    else:
        kept = tl.maximum(s, 1.1754943508222875e-38)
    return tl.where(s == s, kept, s)


@triton.jit
def _change(shift, at, ok):
    """Load 1 + shift of some entries."""
    return 1.0 + tl.load(shift + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def trained_scale(scale0, shift, at, ok, SNAP: tl.constexpr):
    """Compute s = snap(s0 (1 + shift)) of some entries, with the sign of s0."""
    s = tl.load(scale0 + at, mask=ok, other=1.0)
    if shift is not None:
        kept = snap(tl.abs(s) * _change(shift, at, ok), SNAP)
        s = tl.where(s < 0, -kept, kept)
    return s


@triton.jit
def _rows_by_channel(
    scale0, shift, buffer, units, step, out_features, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr, SNAP: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Store s, units, u and t of the rows of this program."""
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    g = tl.arange(0, PADDED)
    row_ok = j < out_features
    at = j[:, None] * GROUPS + g[None, :]
    ok = row_ok[:, None] & (g < GROUPS)[None, :]
    s0 = tl.load(scale0 + at, mask=ok, other=0.0)
    largest, change = tl.max(tl.abs(s0), 1), _change(shift, j, row_ok)
    s = snap(tl.abs(s0) * change[:, None], SNAP)
    tl.store(buffer + at, tl.where(s0 < 0, -s, s), mask=ok)
    count = tl.div_rn(tl.broadcast_to(largest[:, None], (ROWS, PADDED)), tl.where(ok, s0, 1.0))
    tl.store(buffer + units + at, tl.clamp(count, -MOST, MOST), mask=ok)
    tl.store(buffer + step + j, snap(largest * change, SNAP), mask=row_ok)
    tl.store(buffer + step + out_features + j, largest, mask=row_ok)


@triton.jit
def _row_step(scale0, shift, j, row_ok, GROUPS: tl.constexpr, SNAP: tl.constexpr):
    """Compute u, the largest |s| of rows."""
    largest = tl.zeros((j.shape[0],), dtype=tl.float32)
    for start in tl.static_range(0, GROUPS, 16):
        g = start + tl.arange(0, 16)
        ok = row_ok[:, None] & (g < GROUPS)[None, :]
        s0 = tl.load(scale0 + j[:, None] * GROUPS + g[None, :], mask=ok, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(s0), 1))
    return snap(largest * _change(shift, j, row_ok), SNAP)


@triton.jit
def _split(values, AXIS: tl.constexpr, BITS: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """Split values into integers and their common power of two along AXIS."""
    peak = tl.max(tl.abs(values), axis=AXIS)
    exponent = peak.to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, LOWEST), HIGHEST) + 1 - BITS
    step = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return round_half_even(values * tl.expand_dims(inverse, AXIS)), step


@triton.jit
def _a_block(A, buffer, a_step, a_int, a_low, expert, i, k, in_features, RANK, BITS, LOWEST, HIGHEST):
    at = (expert * RANK + k)[:, None] * in_features + i[None, :]
    ok = (k < RANK)[:, None] & (i < in_features)[None, :]
    n, step = _split(tl.load(A + at, mask=ok, other=0.0).to(tl.float32), 0, BITS, LOWEST, HIGHEST)
    tl.store((buffer + a_int).to(tl.pointer_type(tl.float16)) + at, n.to(tl.float16), mask=ok)
    tl.store(buffer + a_step + expert * in_features + i, step, mask=i < in_features)
    if a_low is not None:
        store(a_low + at, n * step[None, :], ok, False)


@triton.jit
def _b_block(
    B,
    c,
    scale0,
    shift,
    stride,
    buffer,
    b_step,
    b_int,
    b_low,
    j,
    k,
    out_features,
    RANK,
    BITS,
    LOWEST,
    HIGHEST,
    SNAP,
    SCALED,
    GROUPS,
):
    at = j[:, None] * RANK + k[None, :]
    row_ok = j < out_features
    ok = row_ok[:, None] & (k < RANK)[None, :]
    n, step = _split(tl.load(B + at, mask=ok, other=0.0).to(tl.float32) * c, 1, BITS, LOWEST, HIGHEST)
    tl.store((buffer + b_int).to(tl.pointer_type(tl.float16)) + at, n.to(tl.float16), mask=ok)
    tl.store(buffer + b_step + j, step, mask=row_ok)
    if b_low is not None:
        if SCALED:
            if GROUPS > 0:
                step = step * _row_step(scale0, shift, j, row_ok, GROUPS, SNAP)
            else:
                step = step * trained_scale(scale0, shift, j * stride, row_ok, SNAP)
        store(b_low + at, n * step[:, None], ok, False)


@launched
@triton.jit
def _prepare_kernel(
    A,
    B,
    scale0,
    shift,
    buffer,
    a_low,
    b_low,
    c,
    stride,
    units,
    step,
    a_step,
    b_step,
    a_int,
    b_int,
    scales,
    in_features,
    out_features,
    stack,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    BITS: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    SNAP: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    MOST: tl.constexpr,
):
    """`scales` are worked on SCALES at a time; by channel (GROUPS > 0) these are rows of scales."""
    program = tl.program_id(0)
    first_a = tl.cdiv(scales, SCALES)
    if program < first_a:
        if GROUPS > 0:
            _rows_by_channel(
                scale0, shift, buffer, units, step, out_features, GROUPS, SCALES, PADDED_GROUPS, SNAP, MOST
            )
        else:
            at = program * SCALES + tl.arange(0, SCALES)
            ok = at < scales
            tl.store(buffer + at, trained_scale(scale0, shift, at, ok, SNAP), mask=ok)
    elif RANK > 0:
        blocks = tl.cdiv(in_features, BLOCK)
        first_b = first_a + blocks * stack
        k = tl.arange(0, PADDED)
        if program < first_b:
            expert = (program - first_a) // blocks
            i = (program - first_a - expert * blocks) * BLOCK + tl.arange(0, BLOCK)
            _a_block(A, buffer, a_step, a_int, a_low, expert, i, k, in_features, RANK, BITS, LOWEST, HIGHEST)
        else:
            j = (program - first_b) * BLOCK + tl.arange(0, BLOCK)
            _b_block(
                B, c, scale0, shift, stride, buffer, b_step, b_int, b_low, j, k, out_features, RANK, BITS, LOWEST,
                HIGHEST, SNAP, SCALED, GROUPS,
            )  # fmt: skip


class _Plan(NamedTuple):
    size: int  # of the buffer
    offsets: Offsets
    launch: Launch


@functools.lru_cache(maxsize=4096)
def _plan(
    scales: tuple[int, int],
    rows: int,
    cols: int,
    rank: int,
    c: float,
    scale_dtype: str,
    scaled: bool,
    channels: bool,
    stack: int,
) -> _Plan:
    """Work out what depends on shapes and constants only."""
    count, at_once = scales[0] * scales[1], SCALE_BLOCK
    offsets, size = layout(scale_stride(scales), count, rows, stack * cols, rank, channels)
    if channels:
        count, at_once = rows, max(1, SCALE_BLOCK // power_of_2(scales[1]))
    padded = max(1, power_of_2(rank))
    block = max(16, min(128, 4096 // padded))
    programs = ceil_div(count, at_once) + (stack * ceil_div(cols, block) + ceil_div(rows, block) if rank else 0)
    launch = _prepare_kernel.launch(
        (programs,),
        float(c),
        *offsets,
        count,
        cols,
        rows,
        stack,
        RANK=rank,
        PADDED=padded,
        BITS=factor_bits(rank),
        LOWEST=_MIN_EXPONENT,
        HIGHEST=_MAX_EXPONENT,
        SNAP=SNAPS[scale_dtype],
        SCALED=scaled,
        BLOCK=block,
        SCALES=at_once,
        GROUPS=scales[1] if channels else 0,
        PADDED_GROUPS=power_of_2(scales[1]),
        MOST=_MOST_UNITS,
    )
    return _Plan(size, offsets, launch)


def prepare(
    scale0: torch.Tensor,
    shift: torch.Tensor | None,
    scale_dtype: str,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    c: float,
    rows: int,
    low: torch.dtype | None = None,
    scaled: bool = False,
    stack: int = 1,
) -> Prepared:
    """Prepare the operands of a layer for the kernels.

    Args:
        scale0 to c: as for `quantized_linear`; of a stack A is (experts R, in) and B (experts out, R).
        rows: output rows of the layer.
        low: also make A~ and B~ in this dtype; None: do not.
        scaled: make s B~ of the latter.
        stack: how many experts these are the operands of.
    """
    scale0 = scale0.contiguous()
    if A is None or B is None or not A.shape[0]:
        if shift is None:
            return Prepared(scale0, None, Offsets(scale_stride(scale0.shape)), 0)
        A = B = None
        rank = cols = 0
    else:
        A, B = A.contiguous(), B.contiguous()
        rank, cols = A.shape[0] // stack, A.shape[1]
    plan = _plan(tuple(scale0.shape), rows, cols, rank, c, scale_dtype, scaled, by_channel(scale0, shift), stack)
    device = scale0.device
    buffer = torch.empty(plan.size, dtype=torch.float32, device=device)
    a_low = b_low = None
    if low is not None and rank:
        a_low = torch.empty(stack * rank, cols, dtype=low, device=device)
        b_low = torch.empty(rows, rank, dtype=low, device=device)
    plan.launch(A, B, scale0, None if shift is None else shift.contiguous(), buffer, a_low, b_low)
    return Prepared(buffer, buffer if rank else None, plan.offsets, rank, a_low, b_low)
