"""References, in plain PyTorch with fp32 inside, of the operations in `library.py`.

Names: `base` is the frozen weight in grid steps as `FrozenWeight` stores it (`peft_lrqat/lrqat/base.py`), `A` (R, in)
and `B` (out, R) are the low-rank factors in grid steps with lora_alpha / r already inside B, T is the number of tokens.
Everything weight-sized in fp32 lives for one row chunk only.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

from ..chunks import row_chunks
from ..grid import grouped
from ..packing import unpack

#: What a frozen base can be stored as: fixed point, packed codes, or floats (kept as raw bits).
DOWNCASTS = ("fx8", "int", "bf16", "fp16", "fp32")
_FLOAT_BITS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Above this share of clipped entries, correcting them one by one costs more than the dense product.
_SPARSE_LIMIT = 0.02


class BaseFormat(NamedTuple):
    """How to read a stored base: the grid's bits, in_features, and one of `DOWNCASTS`."""

    bits: int
    in_features: int
    downcast: str


def encode_base(levels: torch.Tensor, bits: int, downcast: str) -> torch.Tensor:
    """Store W0 / s0 + z, the weight in centred grid steps (LR-QAT eq. 6 and 7: the downcasting operator phi).

    fx8 is 8-bit fixed point with 8 - bits fraction bits. The stored integer n stands for the *middle* of its cell,
    (n + 1/2) / 2^(8-bits): no value lies on a rounding tie, so rounding the stored base gives the codes that rounding
    W0 gives, and every backend agrees about them. (The paper stores cell edges: one weight in 2^(8-bits) then sits on a
    tie, and the smallest A B flips it.)

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
        return base.float().mul_(step).add_(0.5 * step)
    if fmt.downcast == "int":
        return unpack(base, fmt.bits, fmt.in_features).float()
    # a copy even from fp32: callers round in place, and must not round the stored base
    return base.view(_FLOAT_BITS[fmt.downcast]).to(torch.float32, copy=True)


@contextlib.contextmanager
def _exact_fp32(device: torch.device):
    """Full-precision fp32 products whatever the caller allows elsewhere (TF32, bf16 passes, autocast).

    Codes are rounded from Phi + A B: if merging computed A B in another precision than training did, codes would
    differ.
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


def rounded_levels(base: torch.Tensor, A: torch.Tensor | None, B: torch.Tensor | None, fmt: BaseFormat) -> torch.Tensor:
    """round(Phi + B A), before clipping: fp32 (rows, in), centred grid steps, ties to even.

    The one place where codes come from: forward, backward and merge all call it, with the same rows at a time.
    """
    if A is None or B is None:
        return decode_base(base, fmt).round_()
    with _exact_fp32(base.device):
        return torch.mm(B.float(), A.float()).add_(decode_base(base, fmt)).round_()


def codes(base: torch.Tensor, A: torch.Tensor | None, B: torch.Tensor | None, fmt: BaseFormat) -> torch.Tensor:
    """The trained codes: int8 (out, in) in [qmin, qmax]. What merging stores."""
    qmin, qmax = -(1 << (fmt.bits - 1)), (1 << (fmt.bits - 1)) - 1
    out = torch.empty(base.shape[0], fmt.in_features, dtype=torch.int8, device=base.device)
    for rows in row_chunks(out.shape[0], out.shape[1], out.device):
        out[rows] = rounded_levels(base[rows], A, None if B is None else B[rows], fmt).clamp_(qmin, qmax).to(torch.int8)
    return out


def _rows_of(scale: torch.Tensor, rows: slice) -> torch.Tensor:
    return scale if scale.shape[0] == 1 else scale[rows]


def build_weight(
    base: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    fmt: BaseFormat,
    dtype: torch.dtype,
    clipped: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """W^ = s * (clip(round(Phi + B A)) - z), rounded once to `dtype`: (out, in), weight units (LR-QAT eq. 8).

    Args:
        clipped: if a list, receives the (row, column) indices of the clipped entries, a pair of tensors per chunk.
    """
    qmin, qmax = -(1 << (fmt.bits - 1)), (1 << (fmt.bits - 1)) - 1
    weight = torch.empty(base.shape[0], fmt.in_features, dtype=dtype, device=base.device)
    for rows in row_chunks(weight.shape[0], weight.shape[1], weight.device):
        levels = rounded_levels(base[rows], A, None if B is None else B[rows], fmt)
        if clipped is not None:
            row, column = _outside(levels, qmin, qmax)
            clipped.append((row + rows.start, column))
        levels = grouped(levels.clamp_(qmin, qmax), scale)
        if zero_point is not None:
            levels -= _rows_of(zero_point, rows).unsqueeze(-1)
        levels *= _rows_of(scale, rows).unsqueeze(-1)
        weight[rows] = levels.view(-1, fmt.in_features)
    return weight


def _outside(levels: torch.Tensor, qmin: int, qmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    lo, hi = torch.aminmax(levels)
    if lo >= qmin and hi <= qmax:  # the usual case, at the price of one pass
        empty = torch.empty(0, dtype=torch.int64, device=levels.device)
        return empty, empty
    row, column = ((levels < qmin) | (levels > qmax)).nonzero(as_tuple=True)
    return row, column


class Gradients(NamedTuple):
    """Gradients of `quantized_linear`; None where not asked for."""

    x: torch.Tensor | None
    scale: torch.Tensor | None
    A: torch.Tensor | None
    B: torch.Tensor | None


def linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor | None,
    base: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    fmt: BaseFormat,
    need_x: bool,
    need_scale: bool,
    need_AB: bool,
) -> Gradients:
    """Gradients of y = x W^T (see `lrqat/layer.py` for the formulas).

    Args:
        dy, x: (T, out) and (T, in), one dtype.
        y: (T, out), the output without bias, or None; spares the dense product for the scale gradient.

    Returns:
        dx in x's dtype; the others fp32.

    On a CPU, with one scale per row or per tensor, G = dY^T X is never formed: A and B cost what they cost in LoRA and
    the clipped entries, which get no gradient, are subtracted one by one. Elsewhere G is formed a row chunk at a time.
    """
    one_scale_per_row = scale.shape[1] == 1
    lean = one_scale_per_row and dy.device.type == "cpu" and not (need_scale and y is None)
    clipped: list[tuple[torch.Tensor, torch.Tensor]] | None = [] if lean and need_AB else None
    dx = None
    if need_x or clipped is not None:
        weight = build_weight(base, scale, zero_point, A, B, fmt, dy.dtype, clipped)
        if need_x:
            with torch.autocast(dy.device.type, enabled=False):
                dx = torch.mm(dy, weight)
        del weight

    if lean and clipped is not None:
        count = sum(row.numel() for row, _ in clipped)
        lean = count <= _SPARSE_LIMIT * base.shape[0] * fmt.in_features
    if not (need_scale or need_AB):
        return Gradients(dx, None, None, None)
    if not lean:
        return _dense_backward(dy, x, base, scale, zero_point, A, B, fmt, need_scale, need_AB)._replace(x=dx)

    ds = dA = dB = None
    if need_scale:
        assert y is not None
        ds = _per_row(dy, y).unsqueeze(1)  # sum_t dY Y = s * sum_i G Q
        ds = (ds / scale).sum().view(1, 1) if scale.shape[0] == 1 else ds / scale
    if need_AB:
        assert A is not None
        assert B is not None
        assert clipped is not None
        dA, dB = _low_rank_backward(dy, x, scale, A, B, clipped)
    return Gradients(dx, ds, dA, dB)


def _per_row(dy: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """sum over tokens of dy * y, fp32 (out,), without a (T, out) temporary in fp32 for low-precision inputs."""
    total = torch.zeros(dy.shape[1], device=dy.device)
    for tokens in row_chunks(dy.shape[0], dy.shape[1], dy.device):
        total += (dy[tokens].float() * y[tokens].float()).sum(dim=0)
    return total


def _low_rank_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    clipped: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """dA (R, in) and dB (out, R) from LoRA-sized products: dZ = s * G but for the clipped entries, where it is 0."""
    with torch.autocast(dy.device.type, enabled=False):
        xA = torch.mm(x, A.to(x.dtype).t())  # (T, R)
        dB = torch.mm(dy.t(), xA).float() * scale
        sB = (B.float() * scale).to(dy.dtype)
        dA = torch.mm(torch.mm(dy, sB).t(), x).float()
    row = torch.cat([r for r, _ in clipped])
    column = torch.cat([c for _, c in clipped])
    if row.numel():
        # G at the clipped entries only, some at a time: two (T, n) gathers
        s = scale.expand(dy.shape[1], 1).squeeze(1)
        for part in row_chunks(row.numel(), dy.shape[0], dy.device):
            j, i = row[part], column[part]
            g = (dy[:, j].float() * x[:, i].float()).sum(dim=0) * s[j]
            dB.index_add_(0, j, A.float()[:, i].t() * g.unsqueeze(1), alpha=-1)
            dA.index_add_(1, i, B.float()[j].t() * g, alpha=-1)
    return dA, dB


def _dense_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    fmt: BaseFormat,
    need_scale: bool,
    need_AB: bool,
) -> Gradients:
    """Scale, A and B gradients through G = dY^T X, a chunk of rows at a time. No host-device synchronisation."""
    qmin, qmax = -(1 << (fmt.bits - 1)), (1 << (fmt.bits - 1)) - 1
    out_features = base.shape[0]
    ds = torch.zeros_like(scale) if need_scale else None
    dB = torch.empty(B.shape, device=B.device) if need_AB and B is not None else None
    dA = torch.zeros(A.shape, device=A.device) if need_AB and A is not None else None
    for rows in row_chunks(out_features, fmt.in_features, dy.device):
        with torch.autocast(dy.device.type, enabled=False):
            G = torch.mm(dy[:, rows].t(), x).float()
        levels = rounded_levels(base[rows], A, None if B is None else B[rows], fmt)
        inside = (levels >= qmin) & (levels <= qmax)
        if ds is not None:
            Q = grouped(levels.clamp_(qmin, qmax), scale)
            if zero_point is not None:
                Q = Q - _rows_of(zero_point, rows).unsqueeze(-1)
            per_scale = (grouped(G, scale) * Q).sum(dim=-1)
            if scale.shape[0] == 1:
                ds += per_scale.sum(dim=0, keepdim=True)  # per tensor; or one row of groups
            else:
                ds[rows] = per_scale
        if dA is not None and dB is not None and A is not None and B is not None:
            dZ = (grouped(G, scale) * _rows_of(scale, rows).unsqueeze(-1)).view_as(G).mul_(inside)
            with torch.autocast(dy.device.type, enabled=False):
                dB[rows] = torch.mm(dZ, A.float().t())
                dA += torch.mm(B[rows].float().t(), dZ)
    return Gradients(None, ds, dA, dB)
