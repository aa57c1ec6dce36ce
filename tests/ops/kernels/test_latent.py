"""Ternary scales that follow their latent weights by the kernels are the reference's, bit for bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat.grid import snap_scale
from peft_lrqat.ops import kernels, latent, use_kernels
from peft_lrqat.ops.low_bit_step import step_codes
from peft_lrqat.ops.reference_step import DIRECTION, Rule, new_state
from peft_lrqat.tuners.lowbit_sr import LowBitTensor
from tests.low_bit_weights import kernel_weight
from tests.problems import DEVICE

# group sizes and shapes: rows that are no multiple of a tile's, and are; less than a word; whole tiles and a bit;
# several tiles; groups within a word, across words, of a word, of a tile and a half; one for all of many programs
CASES = [
    *((-1, shape) for shape in ((1, 1), (5, 45), (3, 1030), (4, 3072), (300, 32))),
    *((group_size, shape) for group_size, shape in ((5, (7, 45)), (25, (3, 275)), (32, (9, 96)), (192, (2, 384)))),
    *((0, shape) for shape in ((1, 2048), (2, 45), (9, 1030), (1100, 64))),
]


def latent_codes(start: LowBitTensor) -> torch.Tensor:
    """From end to end of what is stored."""
    return torch.randint(-127, 128, start.shape, dtype=torch.int8, device=DEVICE)


@pytest.mark.parametrize(("group_size", "shape"), CASES)
@pytest.mark.parametrize("bits", [1.58, 2, 3, 4])
def test_mean_magnitudes_are_the_references(bits, group_size, shape):
    start = kernel_weight(bits, group_size, shape)
    for codes in (latent_codes(start), None):
        operands = start.packed, codes, start.scale, start.grid, shape[1]
        found = kernels.mean_magnitude(*operands)
        assert found.dtype == torch.float64
        assert torch.equal(found, latent.mean_magnitude(*operands))


@pytest.mark.parametrize(("group_size", "shape"), CASES)
def test_scales_follow_as_the_references(group_size, shape):
    start = kernel_weight(1.58, group_size, shape)
    codes = latent_codes(start)
    means = [latent.mean_magnitude(start.packed, k, start.scale, start.grid, shape[1]) for k in (codes, None)]
    first = latent.first_magnitude(*means)
    # as it was, and grown and shrunk by factors far and near; out of what is stored; a scale of which nobody knows c
    for factor in (torch.ones_like(first), torch.rand_like(first) + 0.5, torch.logspace(-12, 12, first.numel())):
        for rate in (0.01, 0.0):
            c, lr = first * factor.view_as(first).to(DEVICE), torch.tensor(rate, device=DEVICE)
            c[-1, -1:] *= float("nan") if first.numel() > 3 else 1.0
            scales = [start.scale.clone() for _ in range(2)]
            before = [
                module.follow_magnitude(start.packed, codes, scale, c, lr, start.grid)
                for module, scale in zip((kernels, latent), scales, strict=True)
            ]
            assert torch.equal(*before)
            assert torch.equal(before[0], start.scale)
            torch.testing.assert_close(*scales, rtol=0, atol=0, equal_nan=True)
            if not rate:
                assert torch.equal(scales[0], start.scale)
    assert scales[0].shape == start.scale.shape


def test_operands_of_any_strides():
    """A checkpoint, or a view, may bring what kernels cannot walk through."""
    start = kernel_weight(1.58, 16, (6, 48))
    codes = latent_codes(start)
    operands = start.packed, codes, start.scale, start.grid, 48
    expected = latent.mean_magnitude(*operands)
    packed, strided = (t.t().contiguous().t() for t in (start.packed, codes))
    assert torch.equal(kernels.mean_magnitude(packed, strided, start.scale, start.grid, 48), expected)
    c = (expected * 0.7).float()
    lr, scales = torch.tensor(0.01, device=DEVICE), [start.scale.clone() for _ in range(2)]
    kernels.follow_magnitude(packed, strided, scales[0], c.t().contiguous().t(), lr, start.grid)
    latent.follow_magnitude(start.packed, codes, scales[1], c, lr, start.grid)
    assert torch.equal(*scales)
    assert torch.equal(scales[0], snap_scale(scales[0], "auto"))


def test_scales_with_gaps_are_stepped_on_where_they_are():
    """Kernels would write beside them."""
    start, found = kernel_weight(1.58, 16, (6, 48)), []
    grad, lr = torch.randn(6, 48, device=DEVICE), torch.tensor(0.01, device=DEVICE)
    rule = Rule(start.grid, 48, 0.9, 0.98, 1e-8, 0.0, True, "weight", "factored", latent_weights=True)
    for gaps in (False, True):
        packed, stream = start.packed.clone(), start.stream.clone()
        room = torch.full((6, 3, 2), 7.0, device=DEVICE)
        scale = room[..., 0].copy_(start.scale) if gaps else start.scale.clone()
        state = new_state(start.shape, "factored", DIRECTION, packed.device)
        with use_kernels(True):
            for _ in range(3):
                step_codes(packed, scale, stream, grad, state, lr, rule)
        assert (room[..., 1] == 7).all()
        found.append([packed, scale, state["latent_codes"]])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(found[1][1], start.scale)
