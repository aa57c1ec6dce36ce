"""A gradient that is held in bf16 is one of fp32 for everybody but who knows it."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from peft_lrqat.ops.narrow_gradient import Lender, NarrowGradient

VALUES = torch.randn(3, 5, dtype=torch.bfloat16)


def narrow() -> NarrowGradient:
    return NarrowGradient(VALUES.clone())


@pytest.mark.parametrize(
    "read",
    [
        lambda g: g + 1,
        lambda g: g.sum(0),
        lambda g: g[1:].clone(),
        lambda g: torch.linalg.vector_norm(g),
        lambda g: torch.stack([g, g]),
        lambda g: g.to(torch.float64),
    ],
    ids=["add", "sum", "slice", "norm", "stack", "cast"],
)
def test_whoever_reads_it_finds_fp32(read):
    found, expected = read(narrow()), read(VALUES.float())
    assert type(found) is torch.Tensor
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "read",
    [
        lambda g: torch.from_numpy(g.numpy()),
        lambda g: torch.from_numpy(np.asarray(g)),
        lambda g: torch.tensor(g.tolist()),
        copy.deepcopy,
        lambda g: pickle.loads(pickle.dumps(g)),
        lambda g: torch.empty(0).set_(g.untyped_storage()).view(3, 5),
    ],
    ids=["numpy", "asarray", "tolist", "deepcopy", "pickle", "storage"],
)
def test_so_does_who_does_not_ask_torch(read):
    found = read(narrow())
    assert type(found) is torch.Tensor
    assert torch.equal(found, VALUES.float())
    gradient = narrow()
    assert gradient.data_ptr() == gradient.held.data_ptr()
    assert gradient.held.dtype == torch.float32


def test_it_is_narrow_until_somebody_looks():
    gradient = narrow()
    assert (gradient.dtype, gradient.shape) == (torch.float32, VALUES.shape)
    assert gradient.held.dtype == torch.bfloat16
    assert gradient.detach().held is gradient.held
    assert str(gradient) == str(VALUES.float())
    assert gradient.held.dtype == torch.float32


@pytest.mark.parametrize("detached", [False, True])
def test_what_is_written_to_it_stays(detached: bool):
    gradient = narrow()
    (gradient.detach() if detached else gradient).mul_(1 / 3)
    gradient[0] = 7
    expected = VALUES.float().mul_(1 / 3)
    expected[0] = 7
    assert torch.equal(gradient.held, expected)


def test_sums_in_backward_are_fp32s():
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, leaf):
            return leaf.clone()

        @staticmethod
        def backward(ctx, grad):
            return narrow()

    leaf = torch.zeros(3, 5, requires_grad=True)
    Same.apply(leaf).sum().backward()
    assert isinstance(leaf.grad, NarrowGradient)
    leaf.grad = None
    (Same.apply(leaf) + Same.apply(leaf) + leaf).sum().backward()
    Same.apply(leaf).sum().backward()  # to what is there
    assert torch.equal(torch.zeros(3, 5) + leaf.grad, VALUES.float() * 2 + 1 + VALUES.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
class TestLender:
    def test_who_reads_at_once_reads_the_lenders_memory(self, dtype):
        lender, memory = Lender(), VALUES.to(dtype, copy=True)
        assert lender.lend(memory).held is memory
        assert lender.lend(memory).detach().held is memory

    @pytest.mark.parametrize("detached", [False, True])
    def test_who_still_has_a_gradient_keeps_its_values(self, dtype, detached):
        lender, memory = Lender(), VALUES.to(dtype, copy=True)
        gradient = lender.lend(memory)
        gradient = gradient.detach() if detached else gradient
        lender.take_back()
        memory.zero_()
        assert torch.equal(gradient + 0, VALUES.float())

    @pytest.mark.parametrize(
        "look", [NarrowGradient.wide, NarrowGradient.data_ptr, lambda g: g.mul_(1), lambda g: g[0].add_(0)]
    )
    def test_who_looks_has_a_copy(self, dtype, look):
        lender, memory = Lender(), VALUES.to(dtype, copy=True)
        gradient = lender.lend(memory)
        look(gradient)
        memory.zero_()
        assert torch.equal(gradient.held, VALUES.float())

    def test_what_is_written_to_a_gradient_is_not_written_there(self, dtype):
        lender, memory = Lender(), VALUES.to(dtype, copy=True)
        lender.lend(memory).mul_(3)
        lender.lend(memory)[0] = 7
        assert torch.equal(memory, VALUES.to(dtype))

    def test_a_copy_is_made_once(self, dtype):
        lender, memory = Lender(), VALUES.to(dtype, copy=True)
        kept = lender.lend(memory)
        lender.take_back()
        assert kept.held is not memory
        again = kept.held
        lender.take_back()
        assert kept.held is again
