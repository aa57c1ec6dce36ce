"""The embedding lookup with the adapter inside the rounding: rows of W^ instead of a product with W^. No kernel does
this: the functions that are registered here are the reference.

Only the row chunks that hold a looked-up token are built, one at a time, with the same chunk boundaries as everywhere
else, so that a row's codes are the ones that merging stores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..chunks import row_chunks
from ..grid import grouped, rows_of, sum_per_scale
from .dispatch import no_autocast, refuse_second_derivatives
from .factors import optional_factors
from .reference import build_weight, rounded_levels
from .stored_base import BaseFormat


def _tokens_in(ids: Tensor, rows: slice) -> Tensor:
    """Find the positions in the flat `ids` whose token is one of `rows`: int64 (n,)."""
    return ((ids >= rows.start) & (ids < rows.stop)).nonzero().squeeze(1)


@torch.library.custom_op("peft_lrqat::quantized_embedding", mutates_args=())
def _embedding(
    ids: Tensor,
    base: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    c: float,
    bits: int,
    width: int,
    downcast: str,
    dtype: torch.dtype,
    units: Tensor | None = None,
) -> Tensor:
    fmt, flat = BaseFormat(bits, width, downcast), ids.reshape(-1)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < base.shape[0]:
        raise IndexError(
            f"token ids reach from {int(flat.min())} to {int(flat.max())}; the table has {len(base)} rows."
        )
    out = torch.empty(flat.shape[0], width, dtype=dtype, device=base.device)
    with no_autocast(base):
        factors = optional_factors(A, B, c, units)
        for rows in row_chunks(base.shape[0], width, base.device):
            here = _tokens_in(flat, rows)
            if here.numel():
                s, z = rows_of(scale, rows), rows_of(zero_point, rows)
                part = build_weight(base[rows], s, z, factors and factors.rows(rows), fmt, dtype)
                out[here] = part[flat[here] - rows.start]
    return out.view(*ids.shape, width)


@_embedding.register_fake
def _(ids, base, scale, zero_point, A, B, c, bits, width, downcast, dtype, units=None):
    return torch.empty(*ids.shape, width, dtype=dtype, device=base.device)


@torch.library.custom_op("peft_lrqat::quantized_embedding_backward", mutates_args=())
def _embedding_backward(
    dy: Tensor,
    ids: Tensor,
    base: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    c: float,
    bits: int,
    downcast: str,
    units: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of scale, A and B, fp32 (`tuners/lrqat/layer.py`), with G = dY scattered to its rows."""
    width = dy.shape[-1]
    fmt, flat, dy = BaseFormat(bits, width, downcast), ids.reshape(-1), dy.reshape(-1, width).float()
    factors = optional_factors(A, B, c, units)
    ds = torch.zeros_like(scale)
    dA = torch.zeros(A.shape if A is not None else (0,), dtype=torch.float32, device=base.device)
    dB = torch.zeros(B.shape if B is not None else (0,), dtype=torch.float32, device=base.device)
    with no_autocast(dy):
        for rows in row_chunks(base.shape[0], width, base.device):
            here = _tokens_in(flat, rows)
            if not here.numel():
                continue
            s, z = rows_of(scale, rows), rows_of(zero_point, rows)
            levels = rounded_levels(base[rows], factors and factors.rows(rows), fmt)
            G = torch.zeros_like(levels).index_add_(0, flat[here] - rows.start, dy[here])
            inside = (levels >= fmt.qmin) & (levels <= fmt.qmax)
            Q = grouped(levels.clamp_(fmt.qmin, fmt.qmax), s)
            Q = Q if z is None else Q - z.unsqueeze(-1)
            rows_of(ds, rows).add_(sum_per_scale(grouped(G, s) * Q, s))
            if factors is not None:
                step = s if units is None else s * rows_of(units, rows)  # what a unit of B~ A~ moves a weight by
                d = (grouped(G, s) * step.unsqueeze(-1)).view_as(G).mul_(inside)
                dB[rows] = torch.mm(d, factors.A.t())
                dA += torch.mm(factors.B[rows].t(), d)
    return ds, dA, dB.mul_(c)


@_embedding_backward.register_fake
def _(dy, ids, base, scale, zero_point, A, B, c, bits, downcast, units=None):
    return (
        torch.empty_like(scale),
        torch.empty(A.shape if A is not None else (0,), dtype=torch.float32, device=base.device),
        torch.empty(B.shape if B is not None else (0,), dtype=torch.float32, device=base.device),
    )


def _setup_context(ctx, inputs, output) -> None:
    ids, base, scale, zero_point, A, B, ctx.c, ctx.bits, _, ctx.downcast, _, units = inputs
    ctx.save_for_backward(ids, base, scale, zero_point, A, B, units)


def _backward(ctx, dy: Tensor):
    refuse_second_derivatives()
    ids, base, scale, zero_point, A, B, units = ctx.saved_tensors
    ds, dA, dB = _embedding_backward(dy, ids, base, scale, zero_point, A, B, ctx.c, ctx.bits, ctx.downcast, units)
    need_scale, need_A, need_B = (ctx.needs_input_grad[i] for i in (2, 4, 5))
    return (
        None,
        None,
        ds if need_scale else None,
        None,
        dA.to(A.dtype) if need_A else None,
        dB.to(B.dtype) if need_B else None,
        *([None] * 6),
    )


_embedding.register_autograd(_backward, setup_context=_setup_context)


def quantized_embedding(
    ids: Tensor,
    base: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    c: float,
    bits: int,
    width: int,
    downcast: str,
    dtype: torch.dtype,
    units: Tensor | None = None,
) -> Tensor:
    """Look up the rows `ids` of W^ = s * (clip(round(Phi + units c B A)) - z).

    Args:
        ids: integers (...), each in [0, rows of the table).
        base: (table rows, words), as `encode_base` stores it.
        scale: fp32 (rows, groups), s itself (`trained_scale`). Differentiable.
        zero_point, A, B, c: as for `quantized_linear`, with out = table rows and in = `width`.
        bits, downcast: how `base` is stored.
        width: of the embedding.
        dtype: of the result.
        units: what a unit of B A is in grid steps, if not 1: see `reference.adapter_units`.

    Returns:
        (..., width) in `dtype`.

    Raises:
        IndexError: an id is not in the table.
    """
    return _embedding(ids, base, scale, zero_point, A, B, c, bits, width, downcast, dtype, units)
