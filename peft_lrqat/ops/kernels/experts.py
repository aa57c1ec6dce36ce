"""A stack of experts on a GPU; references in `ops/reference_experts.py`.

The kernels are those of one weight (`prepare.py`, `weight.py`, `backward.py`): a stack is a weight of more rows, and
each of its tiles is one expert's. Products are torch's grouped ones, one launch for many experts. `expert_linear` takes
the stack in parts, so that what is weight-sized stays below `PART_BYTES`: where there is but one part the host reads
nothing, else where the tokens of each expert begin, once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..reference import Gradients
from ..reference_experts import Stack, zero_gradients
from ..stored_base import BaseFormat
from .backward import keeps_output, project, row_gradients
from .prepare import Prepared, prepare
from .tiles import ceil_div, tiling
from .weight import prepared_weight

#: W^, or its gradient, of the experts that are worked on at once: what a layer needs beside its operands. Smaller parts
#: mean more launches.
PART_BYTES = 1 << 29


def expert_weights(
    base: torch.Tensor,
    scale0: torch.Tensor,
    shift: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    experts: torch.Tensor | None,
    num_experts: int,
    c: float,
    fmt: BaseFormat,
    scale_dtype: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Build what `reference_experts.expert_weights` does, bit for bit."""
    stack, bounds = Stack(base, scale0, shift, zero_point, A, B), _all(experts, num_experts, base.device)
    listed = _select(stack, slice(None) if experts is None else experts, num_experts)
    prepared = _prepared(listed, bounds, c, scale_dtype)
    return _weights(listed, prepared, fmt, dtype, bounds, base.shape[0] // num_experts)


def expert_weights_backward(
    grad: torch.Tensor,
    base: torch.Tensor,
    scale0: torch.Tensor,
    shift: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    experts: torch.Tensor | None,
    num_experts: int,
    c: float,
    fmt: BaseFormat,
    scale_dtype: str,
    need_shift: bool,
    need_AB: bool,
) -> Gradients:
    """Compute what `reference_experts.expert_weights_backward` does, up to the order of the sums."""
    stack, bounds = Stack(base, scale0, shift, zero_point, A, B), _all(experts, num_experts, base.device)
    total = zero_gradients(stack, need_shift, need_AB)
    need_AB = total.A is not None and total.A.numel() > 0
    if grad.numel() and (need_shift or need_AB):
        which = slice(None) if experts is None else experts
        listed = _select(stack, which, num_experts)
        prepared = _prepared(listed, bounds, c, scale_dtype, grad.dtype if need_AB else None)
        G = torch.empty_like(grad, memory_format=torch.contiguous_format).copy_(grad)  # it is worked on in place
        _add(total, _by_G(G, listed, prepared, c, fmt, need_shift, need_AB, bounds), which, num_experts)
    return total


def expert_linear(
    x: torch.Tensor,
    ends: torch.Tensor,
    base: torch.Tensor,
    scale0: torch.Tensor,
    shift: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    c: float,
    fmt: BaseFormat,
    scale_dtype: str,
) -> torch.Tensor:
    """Compute what `reference_experts.expert_linear` does, with the same W^."""
    stack, num_experts, x = Stack(base, scale0, shift, zero_point, A, B), ends.shape[0], x.contiguous()
    y = x.new_empty(x.shape[0], base.shape[0] // num_experts)
    for part in _parts(ends, x, y.shape[1]):
        listed = _select(stack, part.experts, num_experts)
        prepared = _prepared(listed, part.bounds, c, scale_dtype)
        weights = _weights(listed, prepared, fmt, x.dtype, part.bounds, y.shape[1])
        product = grouped_mm(x[part.tokens], weights.mT, part.bounds[1:])
        del weights
        if part.n == num_experts:
            return product
        y[part.tokens] = product
    return y


def expert_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor | None,
    ends: torch.Tensor,
    base: torch.Tensor,
    scale0: torch.Tensor,
    shift: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    c: float,
    fmt: BaseFormat,
    scale_dtype: str,
    need_x: bool,
    need_shift: bool,
    need_AB: bool,
) -> Gradients:
    """Compute what `reference_experts.expert_linear_backward` does, up to the order of the sums."""
    stack, num_experts, out = Stack(base, scale0, shift, zero_point, A, B), ends.shape[0], dy.shape[1]
    total, dy, x = zero_gradients(stack, need_shift, need_AB), dy.contiguous(), x.contiguous()
    need_AB = total.A is not None and total.A.numel() > 0
    by_rows = keeps_output(scale0, shift, fmt.bits) and (y is not None or not need_shift)
    dx = torch.empty_like(x) if need_x else None
    for part in _parts(ends, x, out):
        bounds, part_dy, part_x = part.bounds, dy[part.tokens], x[part.tokens]
        listed = _select(stack, part.experts, num_experts)
        prepared = _prepared(listed, bounds, c, scale_dtype, dy.dtype if need_AB else None, by_rows)
        flags = None
        if by_rows and need_AB:
            tiles = tiling(out, fmt.in_features, scale0.shape[1], stack=part.n)
            flags = torch.zeros(tiles.total, dtype=torch.int32, device=x.device)  # without tokens nothing is written
        if need_x or flags is not None:
            weights = _weights(listed, prepared, fmt, dy.dtype, bounds, out, flags)
            if dx is not None:
                dx[part.tokens] = grouped_mm(part_dy, weights, bounds[1:])
            del weights
        if by_rows and (need_shift or need_AB):
            part_y = y[part.tokens] if y is not None and need_shift else None
            found = _by_rows(part_dy, part_x, part_y, listed, prepared, c, fmt, flags, bounds)
        elif need_shift or need_AB:
            found = _by_G(
                grouped_mm(part_dy.t(), part_x, bounds[1:]), listed, prepared, c, fmt, need_shift, need_AB, bounds
            )
        else:
            continue
        _add(total, found, part.experts, num_experts)
    return total._replace(x=dx)


def experts_keep_output(scale0: torch.Tensor, shift: torch.Tensor | None, bits: int) -> bool:
    """Tell whether the backward goes by rows (`backward.py`), and then wants Y for the scales."""
    return keeps_output(scale0, shift, bits)


# -- some experts of a stack


def _select(stack: Stack, which: slice | torch.Tensor, num_experts: int) -> Stack:
    """Select n experts, with A (n R, in) and B (n out, R) as the kernels take them. What one scale is for stays."""

    def rows(tensor: Any) -> Any:
        if tensor is None or tensor.shape[0] == 1:
            return tensor
        return tensor.reshape(num_experts, -1, tensor.shape[1])[which].flatten(0, 1)

    A, B = stack.A, stack.B
    if A is not None and B is not None:
        A = rows(A)
        B = B.reshape(B.shape[0], -1, num_experts).permute(2, 0, 1)[which].flatten(0, 1)
    base = stack.base.view(num_experts, -1, stack.base.shape[1])[which].flatten(0, 1).contiguous()
    return Stack(base, rows(stack.scale0), rows(stack.shift), rows(stack.zero_point), A, B)


def _prepared(
    listed: Stack,
    bounds: torch.Tensor,
    c: float,
    scale_dtype: str,
    low: torch.dtype | None = None,
    scaled: bool = False,
) -> Prepared:
    _, scale0, shift, _, A, B = listed
    return prepare(scale0, shift, scale_dtype, A, B, c, listed.base.shape[0], low, scaled, bounds.shape[0] - 1)


def _weights(
    listed: Stack,
    prepared: Prepared,
    fmt: BaseFormat,
    dtype: torch.dtype,
    bounds: torch.Tensor,
    out: int,
    flags: torch.Tensor | None = None,
) -> torch.Tensor:
    """Build W^ (n, out, in); not written where `bounds` leave an expert without tokens."""
    base, groups, zero_point = listed.base, listed.scale0.shape[1], listed.zero_point
    weights = prepared_weight(base, groups, zero_point, prepared, fmt, dtype, flags, bounds)
    return weights.unflatten(0, (bounds.shape[0] - 1, out))


def _by_rows(
    dy: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor | None,
    listed: Stack,
    prepared: Prepared,
    c: float,
    fmt: BaseFormat,
    flags: torch.Tensor | None,
    bounds: torch.Tensor,
) -> Gradients:
    """Compute the gradients of some experts without G: `backward.row_gradients`."""
    xA = dA = None
    if flags is not None:
        assert prepared.a_low is not None
        assert prepared.b_low is not None
        n, ends = bounds.shape[0] - 1, bounds[1:]
        xA = grouped_mm(x, prepared.a_low.view(n, prepared.rank, -1).mT, ends)
        dA = grouped_mm(grouped_mm(dy, prepared.b_low.view(n, -1, prepared.rank), ends).t(), x, ends)
        dA = torch.where((bounds[:-1] < ends).view(-1, 1, 1), dA, 0.0).float().flatten(0, 1)
    dshift, dB = row_gradients(dy, x, y, listed.base, listed.scale0, prepared, c, fmt, flags, xA, dA, bounds)
    return Gradients(None, dshift, dA, dB)


def _by_G(
    G: torch.Tensor,
    listed: Stack,
    prepared: Prepared,
    c: float,
    fmt: BaseFormat,
    need_shift: bool,
    need_AB: bool,
    bounds: torch.Tensor,
) -> Gradients:
    """Compute the gradients of some experts from G (n, out, in), which is overwritten."""
    (n, out, _), dA, dB = G.shape, None, None
    scales, rows = (listed.scale0, listed.zero_point), G.view(n * out, -1)
    dshift = project(rows, listed.base, *scales, prepared, fmt, need_shift, need_AB, bounds)
    if need_AB:
        assert prepared.a_low is not None
        assert prepared.b_low is not None
        dB = _bmm_fp32(G, prepared.a_low.view(n, prepared.rank, -1).mT).flatten(0, 1)
        dB = dB if c == 1 else dB.mul_(c)
        dA = _bmm_fp32(prepared.b_low.view(n, out, -1).mT, G).flatten(0, 1)
    return Gradients(None, dshift, dA, dB)


def _add(total: Gradients, found: Gradients, which: slice | torch.Tensor, num_experts: int) -> None:
    """Add to the gradients of a stack those of some experts, in the layout of `_select`: one that is listed twice gets
    both."""

    def add(whole: torch.Tensor, part: torch.Tensor) -> None:
        part = part.view(-1, *whole.shape[1:])
        if isinstance(which, slice):
            whole[which] += part
        else:
            whole.index_add_(0, which, part)

    if total.shift is not None and found.shift is not None:
        if total.shift.shape[0] == 1:
            total.shift.add_(found.shift)
        else:
            add(total.shift.unflatten(0, (num_experts, -1)), found.shift)
    if total.A is not None and total.B is not None and found.A is not None and found.B is not None:
        add(total.A.unflatten(0, (num_experts, -1)), found.A)
        add(total.B.unflatten(1, (-1, num_experts)).permute(2, 0, 1), found.B)


def _bmm_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply matrix by matrix to fp32, without rounding to their dtype on the way."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.device.type == "cuda":
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


# -- tokens of experts


class _Part(NamedTuple):
    """Some experts that are worked on at once, and their tokens."""

    experts: slice
    tokens: slice
    bounds: torch.Tensor  # int32 (n + 1,): where the tokens of each begin among these, and where the last ones end

    @property
    def n(self) -> int:
        """How many experts."""
        return self.bounds.shape[0] - 1


def _all(experts: torch.Tensor | None, num_experts: int, device: torch.device) -> torch.Tensor:
    """Return bounds by which each of the experts listed has a token."""
    n = num_experts if experts is None else experts.shape[0]
    return torch.arange(n + 1, dtype=torch.int32, device=device)


def _parts(ends: torch.Tensor, x: torch.Tensor, out_features: int) -> Iterator[_Part]:
    """Cut a stack into parts of nearly as many experts each, and leave out those without tokens."""
    if not x.shape[0]:
        return
    num_experts, bounds = ends.shape[0], torch.nn.functional.pad(ends.to(torch.int32), (1, 0))
    fit = max(1, PART_BYTES // (out_features * x.shape[1] * x.element_size()))
    if fit >= num_experts:
        yield _Part(slice(0, num_experts), slice(0, x.shape[0]), bounds)
        return
    size = ceil_div(num_experts, ceil_div(num_experts, fit))
    begins = bounds.tolist()
    for first in range(0, num_experts, size):
        last = min(first + size, num_experts)
        tokens = slice(begins[first], begins[last])
        if tokens.start < tokens.stop:
            yield _Part(slice(first, last), tokens, bounds[first : last + 1] - tokens.start)


def grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply group by group: rows of `a` (T, k) with one of `b` (n, k, m), to (T, m); or columns of `a` (k, T) with
    rows of `b` (T, m), to (n, k, m).

    Args:
        ends: int32 (n,), where the tokens of each group end. What lies behind the last is not defined.
    """
    sizes = (a.shape[0], b.shape[1]) if b.ndim == 2 else b.shape[1:]
    if all(size * a.element_size() % 16 == 0 for size in sizes) and not (a.data_ptr() | b.data_ptr()) & 15:
        return torch.nn.functional.grouped_mm(a, b, offs=ends)
    groups = [slice(*pair) for pair in itertools.pairwise((0, *ends.tolist()))]  # shapes that torch's does not take
    if b.ndim == 2:
        return torch.stack([torch.mm(a[:, group], b[group]) for group in groups])
    product = a.new_empty(a.shape[0], b.shape[2])
    for group, matrix in zip(groups, b, strict=True):
        product[group] = torch.mm(a[group], matrix)
    return product
