"""Rounding a layer's input: the largest magnitude of a row, the rounding and the write in one pass.

A row is a token, or a group of a token's inputs. The arithmetic is that of `ops/reference_inputs.py`, operation
for operation, so the numbers are equal (a zero may have another sign).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..reference_inputs import PER_TOKEN, rule_steps
from .launch import Launch, in_order_of, launched, without_gaps
from .tiles import as_stored, ceil_div, clip, largest_magnitude, load, power_of_2, round_half_even, store

#: Elements that a program holds in registers at a time. A longer row is read twice, the second time from the cache, by
#: programs that leave room for others: one that held 11008 would have a multiprocessor nearly to itself.
_TILE = 4096


@triton.jit
def _quotient(x, y):
    """Divide levels, many of which may be zero. Dividing zero takes a slow path, so y is divided in its place."""
    quotient = tl.div_rn(tl.where(x == 0.0, y, x), y)
    return tl.where(x == 0.0, quotient * 0.0, quotient)  # not a number where y is none, or zero


@triton.jit
def _rounded(x, largest, pointer, RULE: tl.constexpr, BITS: tl.constexpr, STEPS: tl.constexpr, EPS: tl.constexpr):
    """Round fp32 (BM, BN) by the largest magnitude of each row, fp32 (BM,). Launch it without fused operations."""
    steps = tl.zeros_like(largest) + STEPS
    one = tl.zeros_like(largest) + 1.0
    if RULE == "compressed-tensors":
        scale = as_stored(tl.div_rn(largest, steps), pointer)
        scale = tl.where(scale == 0.0, EPS, scale)[:, None]
        return clip(round_half_even(as_stored(tl.div_rn(x, scale + tl.zeros_like(x)), pointer)), BITS) * scale
    elif RULE == "bitnet":
        inverse = tl.div_rn(one, tl.maximum(largest, 1e-5, tl.PropagateNan.ALL)) * STEPS
        return _quotient(clip(round_half_even(x * inverse[:, None]), BITS), inverse[:, None] + tl.zeros_like(x))
    elif RULE == "vllm":
        inverse = tl.where(largest == 0.0, 0.0, tl.div_rn(steps, largest))
        scale = tl.div_rn(largest, steps)
        return clip(round_half_even(x * inverse[:, None]), BITS) * scale[:, None]
    else:
        scale = tl.maximum(tl.div_rn(largest, steps), 1e-30, tl.PropagateNan.ALL)
        inverse = tl.div_rn(one, scale)
        return clip(round_half_even(x * inverse[:, None]), BITS) * scale[:, None]


@launched
@triton.jit
def _kernel(
    out, x, rows, RULE: tl.constexpr, BITS: tl.constexpr, STEPS: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BM + tl.arange(0, BM)
    at, row_ok = j.to(tl.int64)[:, None] * WIDTH, (j < rows)[:, None]
    i = tl.arange(0, BN)[None, :]
    if WIDTH <= BN:  # read once
        ok = row_ok & (i < WIDTH)
        values = load(x + at + i, ok, FULL).to(tl.float32)
        largest = largest_magnitude(values).to(tl.float32, bitcast=True)
        store(out + at + i, _rounded(values, largest, out, RULE, BITS, STEPS, EPS), ok, FULL)
    else:
        bits = tl.zeros((BM,), dtype=tl.int32)
        for first in range(0, WIDTH, BN):
            ok = row_ok & (first + i < WIDTH)
            bits = tl.maximum(bits, largest_magnitude(load(x + at + first + i, ok, False).to(tl.float32)))
        largest = bits.to(tl.float32, bitcast=True)
        for first in range(0, WIDTH, BN):
            ok = row_ok & (first + i < WIDTH)
            values = tl.load(x + at + first + i, mask=ok, other=1.0).to(tl.float32)  # a division of 0 is slow
            store(out + at + first + i, _rounded(values, largest, out, RULE, BITS, STEPS, EPS), ok, False)


@functools.lru_cache(maxsize=1024)
def _launch(rows: int, width: int, rule: str, bits: int, steps: float, dtype: torch.dtype) -> Launch:
    BN = min(power_of_2(width), _TILE)
    BM = max(1, 1024 // BN)
    return _kernel.launch(
        (ceil_div(rows, BM),),
        rows,
        warps=4 if width <= BN else 8,
        fused=False,
        RULE=rule,
        BITS=bits,
        STEPS=steps,
        EPS=torch.finfo(dtype).eps,
        WIDTH=width,
        BM=BM,
        BN=BN,
        FULL=width == BN and rows % BM == 0,
    )


def rounded_inputs(x: torch.Tensor, rule: str, bits: int, group_size: int) -> torch.Tensor:
    """Compute what `reference_inputs.rounded_inputs` does."""
    x, order = without_gaps(x)
    out = torch.empty_like(x)
    width = x.shape[-1] if group_size == PER_TOKEN else group_size
    if out.numel():
        _launch(x.numel() // width, width, rule, bits, rule_steps(rule, bits), x.dtype)(out, x)
    return in_order_of(out, order)
