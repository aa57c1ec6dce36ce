"""LoftQ initialization (arXiv 2310.08659, one iteration, as LR-QAT uses it for the packed base).

With a base of bare codes, Phi = round(W0 / s0), the fraction that each weight had inside its grid cell is gone. One
alternating step quantizes W0, and gives the adapter the best rank-r approximation of what was lost:

    D = W0 / s0 + z - Phi,      lora_B lora_A = SVD_r(D)

in grid steps (with `learn_scales="channel"` of D s0 / t, in the row's largest). The base itself stays the plain
rounding of W0, so that it can be recomputed when the adapter is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...grid import grouped
from ...ops.stored_base import decode_base

if TYPE_CHECKING:
    from ..common.frozen import FrozenWeight


@torch.no_grad()
def residual_factors(
    weight: torch.Tensor, frozen: FrozenWeight, rank: int, units: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors A (rank, in) and B (out, rank), fp32, with B A the best rank-`rank` fit of the lost fractions.

    Args:
        weight: (out, in) original weight, weight units. Entries outside the grid are cut to its ends first: what is
            clipped is not lost to rounding.
        units: of B A, see `ops.reference.adapter_units`.
    """
    scale, grid = frozen.scale0, frozen.grid
    levels = grouped(weight.float().contiguous(), scale) / scale.unsqueeze(-1)
    if frozen.zero_point is not None:
        levels += frozen.here(frozen.zero_point).unsqueeze(-1)
    lost = levels.view_as(weight).clamp_(grid.qmin, grid.qmax).sub_(decode_base(frozen.here(frozen.base), frozen.fmt))
    if units is not None:
        grouped(lost, units).div_(units.unsqueeze(-1))
    U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
    kept = min(rank, S.numel())
    root = S[:kept].sqrt()
    A = torch.zeros(rank, weight.shape[1], dtype=torch.float32, device=weight.device)
    B = torch.zeros(weight.shape[0], rank, dtype=torch.float32, device=weight.device)
    A[:kept], B[:, :kept] = root.unsqueeze(1) * Vh[:kept], U[:, :kept] * root
    return A, B
