"""A layer's small operands by the kernel are the reference's, bit for bit."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat.ops.factors import round_factors
from peft_lrqat.ops.kernels.prepare import prepare
from peft_lrqat.ops.reference import adapter_units, largest_step, snapped_scale
from tests.problems import DEVICE


@pytest.mark.parametrize("rank", [1, 5, 32, 100])
def test_factors_are_the_reference_bit_for_bit(rank):
    A, B = torch.randn(rank, 300) * torch.rand(300), torch.randn(200, rank) * 1e-3
    A[:, 7], B[3], A[0, 8] = 0.0, 0.0, 1e12
    near = round_factors(A, B, 16.0)
    scale0 = torch.ones(200, 1, device=DEVICE)
    found = prepare(scale0, None, "auto", A.to(DEVICE), B.to(DEVICE), 16.0, 200, torch.float32)
    assert torch.equal(found.a_low.cpu(), near.A)
    assert torch.equal(found.b_low.cpu(), near.B)
    buffer, at = found.buffer.cpu(), found.offsets
    integers = buffer.view(torch.float16)
    a = integers[2 * at.a_int :][: rank * 300].view(rank, 300).float() * buffer[at.a_step :][:300]
    b = integers[2 * at.b_int :][: rank * 200].view(200, rank).float() * buffer[at.b_step :][:200, None]
    assert torch.equal(a, near.A)
    assert torch.equal(b, near.B)


@pytest.mark.parametrize("scale_dtype", ["auto", "bf16", "fp16", "fp32"])
def test_scale_is_the_reference_bit_for_bit(scale_dtype):
    scale0 = torch.cat([torch.rand(5000) * 10.0 ** torch.randint(-9, 5, (5000,)), torch.tensor([0.0, 1e-30, 1e9])])
    scale0[::2] *= -1
    shift = torch.randn(5003) * 0.3
    found = prepare(scale0.to(DEVICE)[:, None], shift.to(DEVICE)[:, None], scale_dtype, None, None, 1.0, 5003)
    expected = snapped_scale(scale0, shift, scale_dtype)
    if DEVICE == "cpu" and scale_dtype == "fp16":  # the interpreter's fp16 has subnormals of its own
        usual = expected.abs() > 1e-4
        expected, found = expected[usual], found.scale[:5003][usual]
        assert torch.equal(found, expected)
    else:
        assert torch.equal(found.scale.cpu()[:5003], expected)


@pytest.mark.parametrize(("rows", "groups"), [(1, 2), (300, 5), (3, 1100)])
def test_by_channel_every_part_is_the_reference_bit_for_bit(rows, groups):
    scale0 = torch.randn(rows, groups) * 10.0 ** torch.randint(-4, 2, (rows, groups))
    scale0[0, 0] = 1e-38  # of a group of zeros
    shift, A, B = torch.randn(rows, 1) * 0.3, torch.randn(3, groups), torch.randn(rows, 3)
    operands = [t.to(DEVICE) for t in (scale0, shift, A, B)]
    found = prepare(*operands[:2], "auto", *operands[2:], 1.0, rows, torch.float32, True)
    scale, at = found.scale.cpu(), found.offsets
    assert torch.equal(scale[: scale0.numel()].view_as(scale0), snapped_scale(scale0, shift, "auto"))
    assert torch.equal(scale[at.units :][: scale0.numel()].view_as(scale0), adapter_units(scale0, shift))
    t = largest_step(scale0)
    u = snapped_scale(t, shift, "auto")
    assert torch.equal(u, snapped_scale(scale0, shift, "auto").abs().amax(1, keepdim=True))
    for part, expected in zip(found.row_steps(operands[0]), (t, u), strict=True):
        assert torch.equal(part.cpu(), expected)
    assert torch.equal(found.b_low.cpu(), round_factors(A, B).B * u)
