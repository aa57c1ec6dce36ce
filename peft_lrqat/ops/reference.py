"""References, in plain PyTorch with fp32 inside, of the operations in this folder.

Names: `base` is the frozen weight in grid steps as `stored_base.py` stores it, `factors` are the low-rank factors
A~ (R, in) and B~ (out, R) in grid steps as `factors.py` rounds them, T is the number of tokens. Everything weight-sized
in fp32 lives for one row chunk only.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

from ..chunks import row_chunks
from ..grid import grouped
from .factors import Factors, round_factors
from .stored_base import BaseFormat, decode_base


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


# -- backward

# Above this share of clipped entries, correcting them one by one costs more than the dense product.
_SPARSE_LIMIT = 0.02


def keeps_output(scale: torch.Tensor, device: torch.device) -> bool:
    """Whether the backward goes without G, and then wants Y: where one scale serves a row, on a CPU."""
    return scale.shape[1] == 1 and device.type == "cpu"


class Gradients(NamedTuple):
    """Gradients of `quantized_linear`; None where not asked for. (In this module `shift` holds that of the scale s.)"""

    x: torch.Tensor | None
    shift: torch.Tensor | None
    A: torch.Tensor | None
    B: torch.Tensor | None


def linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor | None,
    base: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    factors: Factors | None,
    fmt: BaseFormat,
    need_x: bool,
    need_scale: bool,
    need_AB: bool,
) -> Gradients:
    """Gradients of y = x W^T (see `tuners/lrqat/layer.py` for the formulas).

    Args:
        dy, x: (T, out) and (T, in), one dtype.
        y: (T, out), the output without bias, or None; spares the dense product for the scale gradient.

    Returns:
        dx in x's dtype; the others fp32. A's and B's are those of A~ and B~.

    On a CPU, with one scale per row or per tensor, G = dY^T X is never formed: A and B cost what they cost in LoRA and
    the clipped entries, which get no gradient, are subtracted one by one. Elsewhere G is formed a row chunk at a time.
    """
    if not (need_scale or need_AB):
        weight = build_weight(base, scale, zero_point, factors, fmt, dy.dtype)
        return Gradients(torch.mm(dy, weight), None, None, None)
    if not keeps_output(scale, dy.device) or (need_scale and y is None):
        return _dense_backward(dy, x, base, scale, zero_point, factors, fmt, need_x, need_scale, need_AB)

    clipped: list[tuple[torch.Tensor, torch.Tensor]] = []
    weight = build_weight(base, scale, zero_point, factors, fmt, dy.dtype, clipped if need_AB else None)
    dx = torch.mm(dy, weight) if need_x else None
    del weight
    if sum(row.numel() for row, _ in clipped) > _SPARSE_LIMIT * base.shape[0] * fmt.in_features:
        return _dense_backward(dy, x, base, scale, zero_point, factors, fmt, False, need_scale, need_AB)._replace(x=dx)
    ds = dA = dB = None
    if need_scale:
        assert y is not None
        ds = _per_row(dy, y).unsqueeze(1)  # sum_t dY Y = s * sum_i G Q
        ds = (ds / scale).sum().view(1, 1) if scale.shape[0] == 1 else ds / scale
    if need_AB:
        assert factors is not None
        dA, dB = _low_rank_backward(dy, x, scale, factors, clipped)
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
    factors: Factors,
    clipped: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """dA (R, in) and dB (out, R) from LoRA-sized products: dZ = s * G but for the clipped entries, where it is 0."""
    A, B = factors
    xA = torch.mm(x, A.to(x.dtype).t())  # (T, R)
    dB = torch.mm(dy.t(), xA).float() * scale
    sB = (B * scale).to(dy.dtype)
    dA = torch.mm(torch.mm(dy, sB).t(), x).float()
    row = torch.cat([r for r, _ in clipped])
    column = torch.cat([c for _, c in clipped])
    if row.numel():
        # G at the clipped entries only, some at a time: two (T, n) gathers
        s = scale.expand(dy.shape[1], 1).squeeze(1)
        for part in row_chunks(row.numel(), dy.shape[0], dy.device):
            j, i = row[part], column[part]
            g = (dy[:, j].float() * x[:, i].float()).sum(dim=0) * s[j]
            dB.index_add_(0, j, A[:, i].t() * g.unsqueeze(1), alpha=-1)
            dA.index_add_(1, i, B[j].t() * g, alpha=-1)
    return dA, dB


def _dense_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    factors: Factors | None,
    fmt: BaseFormat,
    need_x: bool,
    need_scale: bool,
    need_AB: bool,
) -> Gradients:
    """All gradients through G = dY^T X, a chunk of rows at a time. No host-device synchronisation."""
    qmin, qmax = -(1 << (fmt.bits - 1)), (1 << (fmt.bits - 1)) - 1
    ds = torch.zeros_like(scale) if need_scale else None
    dB = torch.empty_like(factors.B) if need_AB and factors else None
    dA = torch.zeros_like(factors.A) if need_AB and factors else None
    weight = torch.empty(base.shape[0], fmt.in_features, dtype=dy.dtype, device=dy.device) if need_x else None
    for rows in row_chunks(base.shape[0], fmt.in_features, dy.device):
        s = rows_of(scale, rows).unsqueeze(-1)
        levels = rounded_levels(base[rows], factors and factors.rows(rows), fmt)
        inner = levels.clamp(qmin, qmax)
        Q = grouped(inner, scale)
        if zero_point is not None:
            Q = Q - rows_of(zero_point, rows).unsqueeze(-1)
        if weight is not None:
            weight[rows] = (Q * s).view_as(levels)
        G = torch.mm(dy[:, rows].t(), x).float()
        if ds is not None:
            per_scale = (grouped(G, scale) * Q).sum(dim=-1)
            if scale.shape[0] == 1:
                ds += per_scale.sum(dim=0, keepdim=True)  # per tensor; or one row of groups
            else:
                ds[rows] = per_scale
        if dA is not None and dB is not None and factors is not None:
            dZ = (grouped(G, scale) * s).view_as(G).mul_(levels == inner)
            dB[rows] = torch.mm(dZ, factors.A.t())
            dA.addmm_(factors.B[rows].t(), dZ)
    return Gradients(None if weight is None else torch.mm(dy, weight), ds, dA, dB)
