"""Numbers that tell two weights apart: an adapter is loaded on the base that it was trained on, or not at all."""

from __future__ import annotations

import torch

from ...chunks import row_chunks
from ...grid import GridTensor


def position_weighted_sum(matrix: torch.Tensor, salt: int) -> torch.Tensor:
    """int64 scalar, modulo 2^64: a sum of integers or fp32 bit patterns, each times a number for its position."""
    total = torch.zeros((), dtype=torch.int64, device=matrix.device)
    columns = torch.arange(matrix.shape[1], device=matrix.device) * 2654435761 + salt
    for rows in row_chunks(matrix.shape[0], matrix.shape[1], matrix.device):
        part = matrix[rows]
        bits = part.float().contiguous().view(torch.int32) if part.is_floating_point() else part
        row = torch.arange(rows.start, rows.stop, device=matrix.device) * 2246822519 + 1
        total += ((bits.to(torch.int64) * columns).sum(dim=1) * row).sum()
    return total


def float_checksum(weight: torch.Tensor) -> int:
    """A number that tells two float (out, in) weights apart. It depends on values only: a bf16 weight and its copy in
    fp32 have the same."""
    return int(position_weighted_sum(weight.detach(), 1))


def codes_checksum(weight: GridTensor) -> int:
    """A number that tells two quantized (out, in) weights apart."""
    total = position_weighted_sum(weight.codes, 1) + position_weighted_sum(weight.scale, 2)
    return int(total if weight.zero_point is None else total + position_weighted_sum(weight.zero_point, 3))
