"""Low-bit SR's W^ and the gradient of its scales by the kernels against the reference: W^ bit for bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat.ops import kernels, low_bit_linear, mean_code, reference, use_kernels
from tests.low_bit_weights import kernel_weight
from tests.problems import DEVICE


# the dtype matters where a weight is stored only
@pytest.mark.parametrize(
    ("bits", "dtype"), [(2, torch.float32), (3, torch.bfloat16), (4, torch.bfloat16), (8, torch.float32)]
)
@pytest.mark.parametrize("projection", [False, True])
def test_the_weight_is_the_references_bit_for_bit(bits, dtype, projection):
    for group_size, shape in {-1: (35, 130), 0: (3, 45), 32: (32, 64), 9: (1, 45)}.items():
        w = kernel_weight(bits, group_size, shape)
        ternary = None
        if projection:  # 0.25: exact ties
            mean = mean_code(w.packed, *w.scale.shape, bits, shape[1])
            ternary = torch.where(torch.rand_like(w.scale) < 0.5, w.scale * 2, w.scale * mean)
        operands = (w.packed, w.scale, ternary, bits, shape[1], dtype)
        assert torch.equal(kernels.low_bit_weight(*operands), reference.low_bit_weight(*operands))


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("group_size", [-1, 0, 9])
def test_the_gradient_of_the_scales(group_size, projection):
    w, grad = kernel_weight(3, group_size, (35, 45)), torch.randn(35, 45, device=DEVICE)
    operands = (grad, w.packed, w.scale, w.scale * 3.3 if projection else None, 3)
    found, expected = (code.scale_gradient(*operands) for code in (kernels, reference))
    assert found.shape == w.scale.shape
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("group_size", [-1, 0, 9])
def test_every_gradient(group_size, projection):
    w = kernel_weight(4, group_size, (35, 45))
    scale = w.scale.clone().requires_grad_()
    ternary = (w.scale * 3.3).requires_grad_() if projection else None
    x = torch.randn(7, 45, device=DEVICE, requires_grad=True)
    leaf, dy = torch.zeros(35, 45, device=DEVICE, requires_grad=True), torch.randn(7, 35, device=DEVICE)
    results = []
    for use in (True, False):
        with use_kernels(use):
            y = low_bit_linear(x, leaf, w.packed, scale, ternary, None, None, 4)
            results.append((y, *torch.autograd.grad(y, [x, leaf, scale if ternary is None else ternary], dy)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    assert all(torch.equal(found, expected) for found, expected in list(zip(*results, strict=True))[:3])
