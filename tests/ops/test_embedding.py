"""The lookup with the adapter inside the rounding: values and gradients against autograd through the plain formula."""

import pytest
import torch

from peft_lrqat.ops import quantized_embedding
from peft_lrqat.ops.embedding import _embedding_backward
from peft_lrqat.ops.reference import adapter_units
from tests.problems import BY_CHANNEL, COLS, GRANULARITY, Problem, assert_close, plain_weight, problem

IDS = torch.tensor([[3, 3, 0], [12, 7, 3]])  # rows that are looked up often, once and never


def table(group_size: int | str = 9, symmetric: bool = False) -> Problem:
    p = problem(3, group_size, symmetric, "int", clip="many")
    p.c = 0.7
    return p


def operands(p: Problem, dtype: torch.dtype = torch.float32) -> tuple:
    scale = p.scale.detach().requires_grad_()
    units = adapter_units(p.scale0, p.shift)
    return (p.base, scale, p.zero_point, p.A, p.B, p.c, p.grid.bits, COLS, p.downcast, dtype, units)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", GRANULARITY)
@pytest.mark.parametrize("chunk", [1, 5 * COLS, 1 << 18])
def test_rows_and_gradients_whatever_the_chunks(monkeypatch, chunk, group_size, symmetric):
    p = table(group_size, symmetric)
    expected, dy = plain_weight(p, relative=False)[IDS], torch.randn(*IDS.shape, COLS)
    truth = torch.autograd.grad(expected, [p.shift, p.A, p.B], dy)
    monkeypatch.setattr("peft_lrqat.chunks.CPU_CHUNK", chunk)
    leaves = operands(p)
    rows = quantized_embedding(IDS, *leaves)
    assert_close(rows, expected)
    ds, dA, dB = torch.autograd.grad(rows, [leaves[1], p.A, p.B], dy)
    for name, found, exact in zip(
        ("shift", "A", "B"), ((ds * p.scale0).sum_to_size(p.shift.shape), dA, dB), truth, strict=True
    ):
        assert_close(found, exact, name)


@pytest.mark.parametrize(("adapter", "group_size"), [(True, 9), (False, 9), (True, BY_CHANNEL)])
def test_opcheck(adapter, group_size):
    p = table(group_size)
    if not adapter:
        p.A = p.B = None
    leaves = operands(p, torch.bfloat16)
    torch.library.opcheck(torch.ops.peft_lrqat.quantized_embedding.default, (IDS, *leaves))
    given = [t if t is None else t.detach() for t in leaves[:5]]
    dy = torch.randn(*IDS.shape, COLS)
    torch.library.opcheck(
        torch.ops.peft_lrqat.quantized_embedding_backward.default,
        (dy, IDS, *given, p.c, p.grid.bits, p.downcast, leaves[-1]),
    )


def test_autocast_leaves_every_number_alone():
    p = table()
    leaves, dy = operands(p), torch.randn(*IDS.shape, COLS)
    given = [t.detach() for t in leaves[:5]]

    def run() -> tuple:
        return (
            quantized_embedding(IDS, *leaves),
            *_embedding_backward(dy, IDS, *given, p.c, p.grid.bits, p.downcast),
        )

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_id_that_is_not_in_the_table_is_refused():
    with pytest.raises(IndexError, match="reach from 1 to 13; the table has 13 rows"):
        quantized_embedding(torch.tensor([1, 13]), *operands(table()))
