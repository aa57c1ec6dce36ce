"""GPTQ for one weight (Frantar et al., arXiv 2210.17323), on this package's grids.

Rounding to nearest treats every weight alone. GPTQ rounds the columns of W one after the other, and each time moves the
columns that are still float so that the layer's *output* on the calibration inputs changes least:

    H = X^T X + damping,    U = upper Cholesky factor of H^-1
    for column j:   q_j = round(w_j / s) + z,     e = (w_j - s (q_j - z)) / U_jj,     w_k -= e U_jk   for k > j

Columns with the largest H_jj come first, because all others can make up for what they lose. Only the arithmetic has
that order. Codes and scales keep their places, so every engine reads the result.
"""

from __future__ import annotations

import torch

from ..grid import Grid, GridTensor
from ..ranges import choose_range

_BLOCK = 128  # columns whose updates are gathered before they reach the rest of the matrix


@torch.no_grad()
def gptq_round(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    *,
    range_method: str = "lp",
    range_p: float = 2.5,
    scale_dtype: str = "auto",
    signed_scales: bool = False,
    damping: float = 0.01,
) -> GridTensor:
    """Codes and scales of a weight, chosen for its inputs.

    Args:
        weight: (out, in), weight units, any float dtype.
        hessian: fp32 (in, in), the sum of x^T x over the layer's inputs, any positive factor.
        range_method, range_p, scale_dtype, signed_scales: how scales are chosen (`choose_range`), from the weight
            before any column was moved.
        damping: what is added to the diagonal of `hessian`, as a fraction of its mean.

    Raises:
        ValueError: the Hessian is not finite, or cannot be factored even with a hundred times the damping.

    Memory: four fp32 matrices of the weight's or the Hessian's size.
    """
    work = weight.detach().to(torch.float32, copy=True)
    out_features, in_features = work.shape
    scale, zero_point = choose_range(work, grid, range_method, range_p, scale_dtype, signed_scales)
    per_scale = in_features // scale.shape[1]
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order], damping)
    group_of = (order // per_scale).tolist()
    work = work[:, order]
    codes = torch.empty(out_features, in_features, dtype=torch.int8, device=work.device)

    for start in range(0, in_features, _BLOCK):
        stop = min(start + _BLOCK, in_features)
        block = work[:, start:stop].t().contiguous()  # (columns, out): a column is one stretch of memory
        local = factor[start:stop, start:stop].contiguous()
        errors = torch.empty_like(block)
        rounded = torch.empty(block.shape, dtype=torch.int8, device=block.device)
        for i, group in enumerate(group_of[start:stop]):
            step = scale[:, group]
            zero = 0.0 if zero_point is None else zero_point[:, group].float()
            code = (block[i] / step).round_().add_(zero).clamp_(grid.qmin, grid.qmax)
            rounded[i] = code.to(torch.int8)
            errors[i] = (block[i] - (code - zero) * step) / local[i, i]
            block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        codes[:, order[start:stop]] = rounded.t()
        work[:, stop:].addmm_(errors.t(), factor[start:stop, stop:], alpha=-1)
    return GridTensor(codes, scale, zero_point, grid)


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """U, upper triangular, with U^T U = (H + damping)^-1: fp32 (in, in)."""
    mean = hessian.diagonal().mean()
    if not torch.isfinite(mean):
        raise ValueError("The calibration inputs of a layer hold NaN or infinite values, so GPTQ has nothing to go by.")
    eye = torch.eye(hessian.shape[0], device=hessian.device)
    for more in (1.0, 10.0, 100.0):
        # a layer that saw only zeros still has a weight to round: to nearest then
        added = (mean * damping * more).clamp(min=1e-12)
        lower, failed = torch.linalg.cholesky_ex(hessian + added * eye)
        if failed.item():
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed.item():
            return upper
    raise ValueError(
        f"The Hessian of a layer could not be factored, even with {100 * damping:g} of its mean on the diagonal. Give "
        "more calibration text, or a larger `damping`."
    )
