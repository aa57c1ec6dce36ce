import pytest
import torch

from peft_lrqat.ops.factors import factor_bits, optional_factors, round_factors


@pytest.mark.parametrize("rank", [1, 5, 32, 33, 64, 256])
def test_products_of_rounded_factors_are_exact_in_any_order(rank):
    A, B = torch.randn(rank, 70) * torch.rand(70) * 10, torch.randn(50, rank) * torch.rand(50, 1) * 0.01
    near = round_factors(A, B, 16.0)
    exact = near.B.double() @ near.A.double()
    order = torch.randperm(rank)
    one_by_one = torch.zeros(50, 70)
    for k in order.tolist():
        one_by_one += near.B[:, k : k + 1] * near.A[k]
    for product in (near.B @ near.A, near.B[:, order] @ near.A[order], one_by_one):
        assert torch.equal(product.double(), exact)
    step = 2.0 ** -factor_bits(rank)  # of the largest entry's power of two
    assert ((near.A - A).abs() <= step * A.abs().amax(0)).all()
    assert ((near.B - 16 * B).abs() <= step * 16 * B.abs().amax(1, keepdim=True)).all()


def test_rounding_the_factors_hardly_changes_their_product():
    A, B = torch.randn(32, 500), torch.randn(700, 32) * 0.01
    near, exact = round_factors(A, B, 16.0), 16 * B.double() @ A.double()
    assert 0 < (near.B.double() @ near.A.double() - exact).norm() < 0.005 * exact.norm()


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-45, 1e30, float("inf"), float("nan")])
def test_extreme_factors(value):
    near = round_factors(torch.full((4, 3), value), torch.full((2, 4), value))
    if value < 1e-30:
        assert torch.equal(near.A, torch.zeros(4, 3))
    elif value == 1e30:
        assert (near.A / value - 1).abs().max() < 2.0**-10
    else:
        assert not torch.isfinite(near.B @ near.A).any()


def test_without_an_adapter_there_are_no_factors():
    assert optional_factors(None, None, 1.0) is None
