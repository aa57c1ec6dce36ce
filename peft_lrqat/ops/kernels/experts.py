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
from .backward import project
from .prepare import Prepared, prepare
from .tiles import ceil_div
from .weight import prepared_weight

#: W^, or its gradient, of the experts that are worked on at once: what a layer needs beside its operands. Smaller parts
#: mean more launches.
PART_BYTES = 1 << 28


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
    if grad.numel():
        G = torch.empty_like(grad, memory_format=torch.contiguous_format).copy_(grad)  # it is worked on in place
        _add_gradients(total, G, stack, slice(None) if experts is None else experts, c, fmt, scale_dtype, bounds)
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
        y[part.tokens] = grouped_mm(x[part.tokens], weights.mT, part.bounds[1:])
        del weights
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
    stack, num_experts, x = Stack(base, scale0, shift, zero_point, A, B), ends.shape[0], x.contiguous()
    total, dy = zero_gradients(stack, need_shift, need_AB), dy.contiguous()
    dx = torch.empty_like(x) if need_x else None
    for part in _parts(ends, x, dy.shape[1]):
        bounds, part_dy = part.bounds, dy[part.tokens]
        if dx is not None:
            listed = _select(stack, part.experts, num_experts)
            prepared = _prepared(listed, bounds, c, scale_dtype)
            weights = _weights(listed, prepared, fmt, dy.dtype, bounds, dy.shape[1])
            dx[part.tokens] = grouped_mm(part_dy, weights, bounds[1:])
            del weights
        if need_shift or need_AB:
            G = grouped_mm(part_dy.t(), x[part.tokens], bounds[1:])
            _add_gradients(total, G, stack, part.experts, c, fmt, scale_dtype, bounds)
            del G
    return total._replace(x=dx)


def experts_keep_output(scale0: torch.Tensor, shift: torch.Tensor | None, bits: int) -> bool:
    """Tell whether the backward wants Y."""
    return False


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
    listed: Stack, bounds: torch.Tensor, c: float, scale_dtype: str, low: torch.dtype | None = None
) -> Prepared:
    _, scale0, shift, _, A, B = listed
    return prepare(scale0, shift, scale_dtype, A, B, c, listed.base.shape[0], low, stack=bounds.shape[0] - 1)


def _weights(
    listed: Stack, prepared: Prepared, fmt: BaseFormat, dtype: torch.dtype, bounds: torch.Tensor, out: int
) -> torch.Tensor:
    """Build W^ (n, out, in); not written where `bounds` leave an expert without tokens."""
    base, groups, zero_point = listed.base, listed.scale0.shape[1], listed.zero_point
    weights = prepared_weight(base, groups, zero_point, prepared, fmt, dtype, bounds=bounds)
    return weights.unflatten(0, (bounds.shape[0] - 1, out))


def _add_gradients(
    total: Gradients,
    G: torch.Tensor,
    stack: Stack,
    which: slice | torch.Tensor,
    c: float,
    fmt: BaseFormat,
    scale_dtype: str,
    bounds: torch.Tensor,
) -> None:
    """Add to the gradients of a stack what G (n, out, in), overwritten here, gives for those of some experts."""
    n, out, _ = G.shape
    num_experts = stack.base.shape[0] // out
    listed = _select(stack, which, num_experts)
    need_AB = total.A is not None and total.A.numel() > 0
    prepared = _prepared(listed, bounds, c, scale_dtype, G.dtype if need_AB else None)
    need_shift = total.shift is not None
    scales, rows = (listed.scale0, listed.zero_point), G.view(n * out, -1)
    dshift = project(rows, listed.base, *scales, prepared, fmt, need_shift, need_AB, bounds)
    if total.shift is not None and dshift is not None:
        if total.shift.shape[0] == 1:
            total.shift.add_(dshift)
        else:
            _add(total.shift.view(num_experts, out, -1), dshift.view(n, out, -1), which)
    if total.A is not None and total.B is not None and need_AB:
        assert prepared.a_low is not None
        assert prepared.b_low is not None
        dB = _bmm_fp32(G, prepared.a_low.view(n, prepared.rank, -1).mT)
        _add(total.B.view(out, -1, num_experts).permute(2, 0, 1), dB if c == 1 else dB.mul_(c), which)
        dA = _bmm_fp32(prepared.b_low.view(n, out, -1).mT, G)
        _add(total.A.view(num_experts, prepared.rank, -1), dA, which)


def _add(total: torch.Tensor, found: torch.Tensor, which: slice | torch.Tensor) -> None:
    """Add to the gradients (E, ...) of experts; one that is listed twice gets both."""
    if isinstance(which, slice):
        total[which] += found
    else:
        total.index_add_(0, which, found)


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
