"""References, in plain PyTorch with fp32 inside, of the operations in `library.py`.

Names: `base` is the frozen weight in grid steps as `FrozenWeight` stores it (`peft_lrqat/lrqat/base.py`), `factors` are
the low-rank factors A~ (R, in) and B~ (out, R) in grid steps as `factors.py` rounds them, T is the number of tokens.
Everything weight-sized in fp32 lives for one row chunk only.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

from ..chunks import row_chunks
from ..grid import grouped
from ..packing import unpack
from .factors import Factors, round_factors

#: What a frozen base can be stored as: fixed point, packed codes, or floats (kept as raw bits).
DOWNCASTS = ("fx8", "int", "bf16", "fp16", "fp32")
_FLOAT_BITS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class BaseFormat(NamedTuple):
    """How to read a stored base: the grid's bits, in_features, and one of `DOWNCASTS`."""

    bits: int
    in_features: int
    downcast: str


def encode_base(levels: torch.Tensor, bits: int, downcast: str) -> torch.Tensor:
    """Store W0 / s0 + z, the weight in centred grid steps (LR-QAT eq. 6 and 7: the downcasting operator phi).

    fx8 is 8-bit fixed point with 8 - bits fraction bits. The stored integer n stands for the *middle* of its cell,
    (n + 1/2) / 2^(8-bits): no value lies on a rounding tie, so rounding the stored base gives the codes that rounding
    W0 gives (only a weight that itself lies on a tie goes up, not to even), and every backend agrees about them. (The
    paper stores cell edges: one weight in 2^(8-bits) then sits on a tie, and the smallest A B flips it.)

    Args:
        levels: (rows, in) fp32, centred grid steps. Overwritten.

    Returns:
        An integer tensor (rows, words), so that no `.to(dtype)` ever changes it: int8 for fx8, packed int32 for int,
        int16 / int32 bit patterns for the float formats.
    """
    qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if downcast == "fx8":
        return levels.clamp_(qmin, qmax).mul_(1 << (8 - bits)).floor_().to(torch.int8)
    if downcast == "int":
        from ..packing import pack

        return pack(levels.round_().clamp_(qmin, qmax).to(torch.int8), bits)
    return levels.to(_FLOAT_BITS[downcast]).view(torch.int32 if downcast == "fp32" else torch.int16)


def decode_base(base: torch.Tensor, fmt: BaseFormat) -> torch.Tensor:
    """Inverse of `encode_base` up to its rounding: fp32 (rows, in), centred grid steps."""
    if fmt.downcast == "fx8":
        step = 2.0 ** (fmt.bits - 8)
        return torch.add(torch.tensor(0.5 * step, dtype=torch.float32), base, alpha=step)  # one kernel
    if fmt.downcast == "int":
        return unpack(base, fmt.bits, fmt.in_features).float()
    # a copy even from fp32: callers round in place, and must not round the stored base
    return base.view(_FLOAT_BITS[fmt.downcast]).to(torch.float32, copy=True)


@contextlib.contextmanager
def exact_fp32(device: torch.device):
    """Full-precision fp32 products whatever the caller allows elsewhere (TF32, bf16 passes, autocast).

    Codes are rounded from Phi + B A: in another precision they would be others.
    """
    # torch's type stubs do not know mkldnn's switches
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore
    before = backend.fp32_precision
    try:
        if before != "ieee":
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "ieee":
            backend.fp32_precision = before


def rounded_levels(base: torch.Tensor, factors: Factors | None, fmt: BaseFormat) -> torch.Tensor:
    """round(Phi + B~ A~), before clipping: fp32 (rows, in), centred grid steps, ties to even.

    The one place where codes come from: forward, backward and merge all call it. B~ A~ is exact (`factors.py`), the sum
    is rounded once to fp32, so the result is the same on every device and for every choice of rows. (Not addmm, which
    may start its sum from Phi and round after every term.)
    """
    levels = decode_base(base, fmt)
    if factors is not None:
        with exact_fp32(base.device):
            levels += torch.mm(factors.B, factors.A)
    return levels.round_()


def codes(
    base: torch.Tensor, A: torch.Tensor | None, B: torch.Tensor | None, fmt: BaseFormat, c: float = 1.0
) -> torch.Tensor:
    """The trained codes round(Phi + c B A), clipped: int8 (out, in) in [qmin, qmax]. What merging stores."""
    factors = None if A is None or B is None else round_factors(A, B, c)
    qmin, qmax = -(1 << (fmt.bits - 1)), (1 << (fmt.bits - 1)) - 1
    out = torch.empty(base.shape[0], fmt.in_features, dtype=torch.int8, device=base.device)
    for rows in row_chunks(out.shape[0], out.shape[1], out.device):
        part = rounded_levels(base[rows], factors and factors.rows(rows), fmt)
        out[rows] = part.clamp_(qmin, qmax).to(torch.int8)
    return out


def rows_of(scale: torch.Tensor, rows: slice) -> torch.Tensor:
    """The scales (or zero points) of some rows; a per-tensor scale serves all."""
    return scale if scale.shape[0] == 1 else scale[rows]


def build_weight(
    base: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    factors: Factors | None,
    fmt: BaseFormat,
    dtype: torch.dtype,
    clipped: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """W^ = s * (clip(round(Phi + B~ A~)) - z), rounded once to `dtype`: (out, in), weight units (LR-QAT eq. 8).

    Args:
        clipped: if a list, receives the (row, column) indices of the clipped entries, a pair of tensors per chunk.
    """
    qmin, qmax = -(1 << (fmt.bits - 1)), (1 << (fmt.bits - 1)) - 1
    weight = torch.empty(base.shape[0], fmt.in_features, dtype=dtype, device=base.device)
    for rows in row_chunks(weight.shape[0], weight.shape[1], weight.device):
        levels = rounded_levels(base[rows], factors and factors.rows(rows), fmt)
        if clipped is not None:
            row, column = _outside(levels, qmin, qmax)
            clipped.append((row + rows.start, column))
        levels = grouped(levels.clamp_(qmin, qmax), scale)
        if zero_point is not None:
            levels -= rows_of(zero_point, rows).unsqueeze(-1)
        levels *= rows_of(scale, rows).unsqueeze(-1)
        weight[rows] = levels.view(-1, fmt.in_features)
    return weight


def _outside(levels: torch.Tensor, qmin: int, qmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    lo, hi = torch.aminmax(levels)
    if lo >= qmin and hi <= qmax:  # the usual case, at the price of one pass
        empty = torch.empty(0, dtype=torch.int64, device=levels.device)
        return empty, empty
    row, column = ((levels < qmin) | (levels > qmax)).nonzero(as_tuple=True)
    return row, column
