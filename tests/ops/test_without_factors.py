"""Layers of rank 0, by the references and by the kernels: the formula's numbers, and no product for nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_lrqat.ops import expert_linear, expert_weights, quantized_embedding, use_kernels
from tests.experts import E, Stack, listed, routed, stack
from tests.problems import (
    BY_CHANNEL,
    GRANULARITY,
    KINDS,
    Problem,
    assert_close,
    check,
    check_low_precision,
    ours,
    plain_weight,
    problem,
    results,
)

KERNELS = pytest.param(
    True, marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"), id="kernels"
)


@pytest.fixture(params=[pytest.param(False, id="reference"), KERNELS])
def there(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Where what runs the operations wants its operands; kernels where they are asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with use_kernels(request.param):
        yield (lambda operands: operands.there()) if request.param else (lambda operands: operands)
    torch.set_float32_matmul_precision(before)


def bare(*args: Any, **options: Any) -> Problem:
    p = problem(*args, **options)
    p.A = p.B = None
    return p


@pytest.mark.parametrize("number", range(len(KINDS)), ids=lambda n: f"{KINDS[n][0]}-{KINDS[n][1]}")
@pytest.mark.parametrize("turn", [0, 1])
def test_every_stored_base(number: int, turn: int, there: Any):
    """The other axes take turns."""
    bits, downcast = KINDS[number]
    size = GRANULARITY[(number + 2 * turn) % 4]
    check(there(bare(bits, size, (number + turn) % 2 == 0, downcast, bias=number % 3 == 0, clip=("few", "many")[turn])))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GRANULARITY)
def test_every_scale_and_zero_point(group_size: int | str, symmetric: bool, there: Any):
    check(there(bare(4, group_size, symmetric, "int")))
    check_low_precision(there(bare(3, group_size, symmetric, "int", rows=32, cols=36)).to(torch.bfloat16), 2)


@pytest.mark.parametrize(("rows", "cols"), [(1, 45), (33, 9), (2, 18), (67, 27)])
@pytest.mark.parametrize("group_size", [9, BY_CHANNEL, -1])
def test_odd_shapes(rows: int, cols: int, group_size: int | str, there: Any):
    check(there(bare(4, group_size, False, "int", rows=rows, cols=cols, shape=(35,), clip="many")))


class _Products(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("group_size", "products"), [(9, 3), (BY_CHANNEL, 2), (-1, 2), (0, 2)])
def test_no_product_is_made_for_factors(group_size: int | str, products: int, there: Any):
    """y, the gradient of x and, where scales belong to groups, that of W."""
    p = there(bare(4, group_size, clip="few"))
    with _Products() as counted:
        results(ours(p), p)
    assert counted.count == products


def without(s: Stack) -> tuple:
    return s.base, s.scale0, s.shift, s.zero_point, None, None


@pytest.mark.parametrize("group_size", GRANULARITY)
@pytest.mark.parametrize("name", ["some", "all"])
def test_experts(group_size: int | str, name: str, there: Any):
    """Those of factors that are 0."""
    s = stack(4, group_size, group_size == 9, "int", rows=5, cols=18)
    s.A, s.B = torch.zeros_like(s.A), torch.zeros_like(s.B)
    s = there(s)
    x, ends, dy = routed(s, name)
    constants = s.constants
    found, truth = [], []
    for operands, into in ((without(s), found), (s.tensors, truth)):
        y = expert_linear(x, ends, *operands, *constants[1:-1])
        built = expert_weights(*operands, listed(s, name), *constants, torch.float32)
        of_y = torch.autograd.grad(y, [x, s.shift], dy)
        (of_built,) = torch.autograd.grad(built, [s.shift], torch.ones_like(built))
        into += [y, built, *of_y, of_built]
    assert found[1].shape[0] == (E if name == "all" else 2)
    for mine, exact in zip(found, truth, strict=True):
        assert_close(mine, exact)


@pytest.mark.parametrize("group_size", GRANULARITY)
def test_embeddings(group_size: int | str):
    p = bare(3, group_size, False, "int")
    ids, scale = torch.tensor([[3, 3, 0], [12, 7, 3]]), p.scale.detach().requires_grad_()
    rows = quantized_embedding(ids, p.base, scale, p.zero_point, None, None, 1.0, 3, 45, "int", torch.float32)
    expected, dy = plain_weight(p, relative=False)[ids], torch.randn(rows.shape)
    assert_close(rows, expected)
    (found,) = torch.autograd.grad(rows, [scale], dy)
    (exact,) = torch.autograd.grad(expected, [p.shift], dy)
    assert_close((found * p.scale0).sum_to_size(p.shift.shape), exact)
