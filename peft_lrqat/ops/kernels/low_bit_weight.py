"""Low-bit SR's weight: W^ with or without its ternary projection, and the gradient of a learned scale.

Without a projection W^ is that of LR-QAT without an adapter, and the kernel is the same (`weight.py`).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ...grid import sum_per_scale
from .launch import Kernel, Launch, launched
from .tiles import load, round_half_even, scale_stride, store, stored_levels, tile_columns, tiling
from .weight import launch_without_adapter


@triton.jit
def _levels(
    packed, scale, ternary_scale, scale_stride, j, i, first, group, row_ok, column_ok, words, BITS: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Build `reference.low_bit_levels` (BM, BN). Launch it without fused operations: q r is rounded on its own."""
    q = stored_levels(packed, j, i, first, row_ok, column_ok, words, BITS, "int", FULL)
    if ternary_scale is not None:
        s = tl.load(scale + j * scale_stride + group, mask=row_ok, other=1.0)
        t = tl.load(ternary_scale + j * scale_stride + group, mask=row_ok, other=1.0)
        z = round_half_even(q * tl.div_rn(s, t)[:, None])
        q = tl.clamp(z, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return q


@launched
@triton.jit
def _ternary_kernel(
    weight, packed, scale, ternary_scale, scale_stride, words, in_features, out_features, GROUP: tl.constexpr,
    BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    i, column_ok, group, first = tile_columns(tl.program_id(0), GROUP, BN)
    j = tl.program_id(1) * BM + tl.arange(0, BM)
    row_ok = j < out_features
    t = _levels(packed, scale, ternary_scale, scale_stride, j, i, first, group, row_ok, column_ok, words, BITS, FULL)
    s = load(ternary_scale + j * scale_stride + group, row_ok, FULL)
    at = weight + j.to(tl.int64)[:, None] * in_features + i[None, :]
    store(at, t * s[:, None], row_ok[:, None] & column_ok[None, :], FULL)


@launched
@triton.jit
def _scale_sums_kernel(
    sums, grad, packed, scale, ternary_scale, scale_stride, words, in_features, out_features, GROUP: tl.constexpr,
    BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    i, column_ok, group, first = tile_columns(tl.program_id(0), GROUP, BN)
    j = tl.program_id(1) * BM + tl.arange(0, BM)
    row_ok = j < out_features
    q = _levels(packed, scale, ternary_scale, scale_stride, j, i, first, group, row_ok, column_ok, words, BITS, FULL)
    g = load(grad + j.to(tl.int64)[:, None] * in_features + i[None, :], row_ok[:, None] & column_ok[None, :], FULL)
    total = tl.sum(tl.where(column_ok[None, :], g.to(tl.float32) * q, 0.0), 1)
    tl.store(sums + j * tl.num_programs(0) + tl.program_id(0), total, mask=row_ok)


@functools.lru_cache(maxsize=1024)
def _launch(kernel: Kernel, rows: int, in_features: int, words: int, scales: tuple[int, int], bits: int) -> Launch:
    """Fix a launch of one of the two kernels above, which cut the weight into the same tiles."""
    tiles = tiling(rows, in_features, scales[1], loops=False)
    return kernel.launch(
        tiles.grid,
        scale_stride(scales),
        words,
        in_features,
        rows,
        fused=False,
        GROUP=tiles.group,
        BITS=bits,
        BM=tiles.BM,
        BN=tiles.BN,
        FULL=tiles.full,
    )


def low_bit_weight(
    packed: torch.Tensor,
    scale: torch.Tensor,
    ternary_scale: torch.Tensor | None,
    bits: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Build what `reference.low_bit_weight` does, bit for bit."""
    rows, words = packed.shape
    packed, scale = packed.contiguous(), scale.contiguous()
    weight = torch.empty(rows, in_features, dtype=dtype, device=packed.device)
    if not weight.numel():
        return weight
    if ternary_scale is None:
        launch = launch_without_adapter(rows, words, in_features, tuple(scale.shape), bits)
        launch(weight, None, packed, None, scale, None, None)
    else:
        launch = _launch(_ternary_kernel, rows, in_features, words, tuple(scale.shape), bits)
        launch(weight, packed, scale, ternary_scale.contiguous())
    return weight


def scale_gradient(
    grad: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, ternary_scale: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Compute what `reference.scale_gradient` does, up to the order of the sums."""
    rows, in_features = grad.shape
    if not grad.numel():
        return torch.zeros_like(scale)
    columns = tiling(rows, in_features, scale.shape[1], loops=False).columns
    sums = torch.empty(rows, columns, dtype=torch.float32, device=grad.device)
    ternary_scale = None if ternary_scale is None else ternary_scale.contiguous()
    launch = _launch(_scale_sums_kernel, rows, in_features, packed.shape[1], tuple(scale.shape), bits)
    launch(sums, grad.contiguous(), packed.contiguous(), scale.contiguous(), ternary_scale)
    return sum_per_scale(sums, scale)
