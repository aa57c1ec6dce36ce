"""The references, in plain PyTorch with fp32 inside, of the two linear layers: `linear.py` and `low_bit.py`.

A function that `kernels/` has too bears the same name there, takes the same arguments and returns the same things.
(Embeddings have no kernel: `embedding.py` is its own reference. That of the optimizer step is `reference_step.py`.)

Names: `base` is the frozen weight in grid steps as `stored_base.py` stores it, `factors` are the low-rank factors
A~ (R, in) and B~ (out, R) in grid steps as `factors.py` rounds them, T is the number of tokens. Everything weight-sized
in fp32 lives for one row chunk only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chunks import row_chunks
from ..grid import grouped, rows_of, snap_magnitude, sum_per_scale, with_sign_of
from ..packing import unpack
from .factors import Factors, optional_factors
from .stored_base import BaseFormat, decode_base


@contextlib.contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """Multiply in full fp32 inside, whatever the caller allows elsewhere (TF32, bf16 passes, autocast).

    Codes are rounded from Phi + B A: in another precision they would be others.
    """
    mkldnn: Any = torch.backends.mkldnn  # torch's type stubs do not know its switches
    backend = torch.backends.cuda.matmul if device.type == "cuda" else mkldnn.matmul
    before = backend.fp32_precision
    try:
        if before != "ieee":
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "ieee":
            backend.fp32_precision = before


# -- the weight of LR-QAT


def snapped_scale(scale0: Tensor, shift: Tensor | None, scale_dtype: str) -> Tensor:
    """Compute s = snap(s0 (1 + shift)): fp32 (rows, groups), weight units per grid step; s0 itself without a shift.

    It keeps the sign of s0: a scale that training has moved through zero is held at the smallest that is stored.
    """
    if shift is None:
        return scale0
    return with_sign_of(scale0, snap_magnitude(scale0.abs() * (1 + shift.float()), scale_dtype))


def by_channel(scale0: Tensor, shift: Tensor | None) -> bool:
    """Tell whether one shift moves several scales of a row: (rows, 1) of (rows, groups)."""
    return shift is not None and shift.shape[1] != scale0.shape[1]


def largest_step(scale0: Tensor) -> Tensor:
    """Find t_j, the largest |s0| of a row: fp32 (rows, 1), weight units."""
    return scale0.abs().amax(1, keepdim=True)


# What is all zero has the smallest scale there is. A finite quotient keeps 0 times it at 0.
_MOST_UNITS = 2.0**40


def adapter_units(scale0: Tensor, shift: Tensor | None) -> Tensor | None:
    """Compute t_j / s0_jg, the grid steps that a unit of B A is where it counts the row's largest step.

    Args:
        scale0, shift: as for `quantized_linear`.

    Returns:
        fp32 (rows, groups), with the signs of s0; None where B A counts grid steps.
    """
    if not by_channel(scale0, shift):
        return None
    return (largest_step(scale0) / scale0).clamp_(-_MOST_UNITS, _MOST_UNITS)


def rounded_levels(base: Tensor, factors: Factors | None, fmt: BaseFormat) -> Tensor:
    """Build round(Phi + units B~ A~), before clipping: fp32 (rows, in), centred grid steps, ties to even.

    The one place where codes come from: forward, backward and merge all call it. B~ A~ is exact (`factors.py`), its
    product with the units (if there are any) is rounded once to fp32, and so is the sum: the result is the same on
    every device and for every choice of rows. (Not addmm, which may start its sum from Phi and round after every term,
    nor addcmul, which may round once for both.)
    """
    levels = decode_base(base, fmt)
    if factors is not None:
        with exact_fp32(base.device):
            product = torch.mm(factors.B, factors.A)
        if factors.units is not None:
            grouped(product, factors.units).mul_(factors.units.unsqueeze(-1))
        levels += product
    return levels.round_()


def codes(
    base: Tensor, A: Tensor | None, B: Tensor | None, fmt: BaseFormat, c: float = 1.0, units: Tensor | None = None
) -> Tensor:
    """Build the trained codes round(Phi + units c B A), clipped: int8 (out, in) in [qmin, qmax]. What merging stores.

    Args:
        units: see `adapter_units`.
    """
    factors = optional_factors(A, B, c, units)
    out = torch.empty(base.shape[0], fmt.in_features, dtype=torch.int8, device=base.device)
    for rows in row_chunks(out.shape[0], out.shape[1], out.device):
        part = rounded_levels(base[rows], factors and factors.rows(rows), fmt)
        out[rows] = part.clamp_(fmt.qmin, fmt.qmax).to(torch.int8)
    return out


def build_weight(
    base: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    factors: Factors | None,
    fmt: BaseFormat,
    dtype: torch.dtype,
    clipped: list[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Build W^ = s * (clip(round(Phi + units B~ A~)) - z), rounded once to `dtype`: (out, in), weight units (LR-QAT
    eq. 8).

    Args:
        scale: fp32 (rows, groups), s itself.
        clipped: if a list, receives the (row, column) indices of the clipped entries, a pair of tensors per chunk.
    """
    weight = torch.empty(base.shape[0], fmt.in_features, dtype=dtype, device=base.device)
    for rows in row_chunks(weight.shape[0], weight.shape[1], weight.device):
        levels = rounded_levels(base[rows], factors and factors.rows(rows), fmt)
        if clipped is not None:
            row, column = _outside(levels, fmt)
            clipped.append((row + rows.start, column))
        levels = grouped(levels.clamp_(fmt.qmin, fmt.qmax), scale)
        if zero_point is not None:
            levels -= rows_of(zero_point, rows).unsqueeze(-1)
        levels *= rows_of(scale, rows).unsqueeze(-1)
        weight[rows] = levels.view(-1, fmt.in_features)
    return weight


def _outside(levels: Tensor, fmt: BaseFormat) -> tuple[Tensor, Tensor]:
    """Find the entries that the clip changes: int64 (n,) rows and columns."""
    lo, hi = torch.aminmax(levels)
    if lo >= fmt.qmin and hi <= fmt.qmax:  # the usual case, at the price of one pass
        empty = torch.empty(0, dtype=torch.int64, device=levels.device)
        return empty, empty
    row, column = ((levels < fmt.qmin) | (levels > fmt.qmax)).nonzero(as_tuple=True)
    return row, column


def linear_weight(
    base: Tensor,
    scale0: Tensor,
    shift: Tensor | None,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    c: float,
    fmt: BaseFormat,
    scale_dtype: str,
    dtype: torch.dtype,
) -> Tensor:
    """Build W^ of `quantized_linear`, rounded once to `dtype`: (out, in). See there for the arguments."""
    scale, units = snapped_scale(scale0, shift, scale_dtype), adapter_units(scale0, shift)
    return build_weight(base, scale, zero_point, optional_factors(A, B, c, units), fmt, dtype)


# -- the backward of LR-QAT

# Above this share of clipped entries, correcting them one by one costs more than forming G.
_SPARSE_LIMIT = 0.02


def keeps_output(scale0: Tensor, shift: Tensor | None, bits: int) -> bool:
    """Tell whether the backward goes without G, and then wants Y: where one scale, or one shift of scales, serves a
    row, on a CPU."""
    device = (scale0 if shift is None else shift).device  # of scales that may be staged, the shift tells where
    return (scale0.shape[1] == 1 or by_channel(scale0, shift)) and device.type == "cpu"


class Gradients(NamedTuple):
    """Gradients of `quantized_linear`; None where not asked for. That of x in x's dtype, the others fp32."""

    x: Tensor | None
    shift: Tensor | None
    A: Tensor | None
    B: Tensor | None


def linear_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    base: Tensor,
    scale0: Tensor,
    shift: Tensor | None,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    c: float,
    fmt: BaseFormat,
    scale_dtype: str,
    need_x: bool,
    need_shift: bool,
    need_AB: bool,
) -> Gradients:
    """Compute the gradients of y = x W^T, whose formulas are in `tuners/lrqat/layer.py`.

    Args:
        dy, x: (T, out) and (T, in), one dtype.
        y: (T, out), the output without bias, or None; spares the gradient of the shift the product dY^T X.
        base to scale_dtype: as for `quantized_linear`.
        need_x, need_shift, need_AB: what is asked for.

    On a CPU, with one scale (or one shift of scales) per row or per tensor, G = dY^T X is never formed: A and B cost
    what they cost in LoRA and the clipped entries, which get no gradient, are subtracted one by one. Elsewhere G is
    formed a row chunk at a time.
    """
    scale, step0, step = _steps(scale0, shift, scale_dtype)
    factors = optional_factors(A, B, c, adapter_units(scale0, shift))
    need_AB = need_AB and factors is not None
    side = (base, scale, step, zero_point, factors, fmt)

    def G(rows: slice) -> Tensor:
        return torch.mm(dy[:, rows].t(), x).float()

    by_rows = keeps_output(scale0, shift, fmt.bits) and (y is not None or not need_shift)
    dshift = ds = dA = dB = None
    if by_rows or not (need_shift or need_AB):
        clipped: list[tuple[Tensor, Tensor]] = []
        dx = None
        if need_x or need_AB:
            built = build_weight(base, scale, zero_point, factors, fmt, dy.dtype, clipped if need_AB else None)
            dx = torch.mm(dy, built) if need_x else None
            del built
        if sum(row.numel() for row, _ in clipped) > _SPARSE_LIMIT * base.shape[0] * fmt.in_features:
            _, ds, dA, dB = _by_G(G, *side, None, need_shift, need_AB)
        else:
            if need_shift and y is not None:  # sum_t dY Y = sum_i G W^
                dshift = sum_per_scale(_per_row(dy, y).unsqueeze(1) / step, step) * step0
            if need_AB and factors is not None:
                dA, dB = _low_rank_by_rows(dy, x, step, factors, clipped)
    else:
        weight, ds, dA, dB = _by_G(G, *side, dy.dtype if need_x else None, need_shift, need_AB)
        dx = None if weight is None else torch.mm(dy, weight)
    if ds is not None:
        dshift = _shift_gradient(ds, scale, step0, step)
    return Gradients(dx, dshift, dA, None if dB is None else dB.mul_(c))  # B~ is c B


def weight_backward(
    grad: Tensor,
    base: Tensor,
    scale0: Tensor,
    shift: Tensor | None,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    c: float,
    fmt: BaseFormat,
    scale_dtype: str,
    need_shift: bool,
    need_AB: bool,
) -> Gradients:
    """Compute the gradients of W^ itself, as `linear_backward` does where it forms G.

    Args:
        grad: (out, in), G = dL/dW^.
        base to scale_dtype: as for `quantized_linear`.
    """
    scale, step0, step = _steps(scale0, shift, scale_dtype)
    factors = optional_factors(A, B, c, adapter_units(scale0, shift))
    side = (base, scale, step, zero_point, factors, fmt)
    _, ds, dA, dB = _by_G(lambda rows: grad[rows].float(), *side, None, need_shift, need_AB)
    dshift = None if ds is None else _shift_gradient(ds, scale, step0, step)
    return Gradients(None, dshift, dA, None if dB is None else dB.mul_(c))


def _steps(scale0: Tensor, shift: Tensor | None, scale_dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Compute s, and what a unit of B~ A~ moves a weight by, before training and now: the scales of single groups, or
    the row's largest, t and u."""
    scale = snapped_scale(scale0, shift, scale_dtype)
    if not by_channel(scale0, shift):
        return scale, scale0, scale
    step0 = largest_step(scale0)
    return scale, step0, snapped_scale(step0, shift, scale_dtype)


def _shift_gradient(ds: Tensor, scale: Tensor, step0: Tensor, step: Tensor) -> Tensor:
    """Compute the gradient of the shift from that of s; the rest is what `_steps` returns."""
    return ds * step0 if step is scale else shift_gradient_by_row(ds, scale, step0, step)


def shift_gradient_by_row(ds: Tensor, scale: Tensor, step0: Tensor, step: Tensor) -> Tensor:
    """Compute the gradient of a shift (rows, 1) that moves all scales of a row: sum_g ds_jg s_jg / (1 + shift_j).

    Args:
        ds, scale: (rows, groups), the gradient of s, and s.
        step0, step: (rows, 1), t and u, the largest |s0| and |s| of a row; u / t is 1 + shift, as it is stored.
    """
    return (ds * scale).sum(1, keepdim=True) / step * step0


def _per_row(dy: Tensor, y: Tensor) -> Tensor:
    """Sum dy * y over tokens, fp32 (out,), without a (T, out) temporary in fp32 for low-precision inputs."""
    total = torch.zeros(dy.shape[1], dtype=torch.float32, device=dy.device)
    for tokens in row_chunks(dy.shape[0], dy.shape[1], dy.device):
        total += (dy[tokens].float() * y[tokens].float()).sum(dim=0)
    return total


def _low_rank_by_rows(
    dy: Tensor, x: Tensor, scale: Tensor, factors: Factors, clipped: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of A~ (R, in) and B~ (out, R), fp32, from LoRA-sized products: that of B~ A~ is `scale` *
    G, and 0 at the clipped entries.

    Args:
        scale: (rows, 1), what a unit of B~ A~ moves a weight by.
    """
    A, B, _ = factors
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


def _by_G(
    G_of: Callable[[slice], Tensor],
    base: Tensor,
    scale: Tensor,
    step: Tensor,
    zero_point: Tensor | None,
    factors: Factors | None,
    fmt: BaseFormat,
    weight_dtype: torch.dtype | None,
    need_scale: bool,
    need_AB: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Build W^, and compute the gradients of s, A~ and B~, through G = dL/dW^, a chunk of rows at a time.

    Args:
        G_of: returns G of some output rows, fp32 (rows, in).
        step: what a unit of B~ A~ moves a weight by, (rows, groups) or (rows, 1).
        weight_dtype: of W^; None: it is not wanted.

    No host-device synchronisation.
    """
    ds = torch.zeros_like(scale) if need_scale else None
    dB = torch.empty_like(factors.B) if need_AB and factors else None
    dA = torch.zeros_like(factors.A) if need_AB and factors else None
    weight = None
    if weight_dtype is not None:
        weight = torch.empty(base.shape[0], fmt.in_features, dtype=weight_dtype, device=base.device)
    for rows in row_chunks(base.shape[0], fmt.in_features, base.device):
        s = rows_of(scale, rows)
        levels = rounded_levels(base[rows], factors and factors.rows(rows), fmt)
        inner = levels.clamp(fmt.qmin, fmt.qmax)
        Q = grouped(inner, scale)
        if zero_point is not None:
            Q = Q - rows_of(zero_point, rows).unsqueeze(-1)
        if weight is not None:
            weight[rows] = (Q * s.unsqueeze(-1)).view_as(levels)
        G = G_of(rows)
        if ds is not None:
            rows_of(ds, rows).add_(sum_per_scale(grouped(G, scale) * Q, s))
        if dA is not None and dB is not None and factors is not None:
            d = (grouped(G, step) * rows_of(step, rows).unsqueeze(-1)).view_as(G).mul_(levels == inner)
            dB[rows] = torch.mm(d, factors.A.t())
            dA.addmm_(factors.B[rows].t(), d)
    return weight, ds, dA, dB


# -- low-bit SR


def low_bit_levels(packed: Tensor, scale: Tensor, ternary_scale: Tensor | None, bits: int, in_features: int) -> Tensor:
    """Build the integers that the forward multiplies with its scale: fp32 (rows, in).

    Without a projection the codes q; with one, clip(round(q * scale / ternary_scale), -1, 1).

    Args:
        packed: int32 (rows, words).
        scale, ternary_scale: fp32 (rows or 1, groups).
    """
    levels = unpack(packed, bits, in_features).float()
    if ternary_scale is None:
        return levels
    ratio = (scale / ternary_scale).unsqueeze(-1)
    return (grouped(levels, scale) * ratio).round_().clamp_(-1, 1).view_as(levels)


def low_bit_weight(
    packed: Tensor, scale: Tensor, ternary_scale: Tensor | None, bits: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Build W^ = s * q, or t_s * clip(round(q * s / t_s), -1, 1): (out, in), rounded once to `dtype`.

    Args:
        packed: int32 (out, words).
        scale, ternary_scale: fp32 (out or 1, groups), s and t_s; without t_s, no projection.
        bits: width of a packed code.
    """
    weight = torch.empty(packed.shape[0], in_features, dtype=dtype, device=packed.device)
    for rows in row_chunks(packed.shape[0], in_features, packed.device):
        s, t = rows_of(scale, rows), rows_of(ternary_scale, rows)
        levels = low_bit_levels(packed[rows], s, t, bits, in_features)
        weight[rows] = (grouped(levels, s) * (s if t is None else t).unsqueeze(-1)).view_as(levels)
    return weight


def scale_gradient(grad: Tensor, packed: Tensor, scale: Tensor, ternary_scale: Tensor | None, bits: int) -> Tensor:
    """Sum G q (or G t, the projected codes) over the weights that share a scale: fp32, `scale`'s shape.

    Args:
        grad: fp32 (out, in): G = dL/dW^.
        packed, scale, ternary_scale, bits: as for `low_bit_weight`.
    """
    ds = torch.zeros_like(scale)
    for rows in row_chunks(grad.shape[0], grad.shape[1], grad.device):
        s, t = rows_of(scale, rows), rows_of(ternary_scale, rows)
        levels = low_bit_levels(packed[rows], s, t, bits, grad.shape[1])
        rows_of(ds, rows).add_(sum_per_scale(levels.mul_(grad[rows]), s))
    return ds
