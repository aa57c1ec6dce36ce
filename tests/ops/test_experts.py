"""A stack of experts: each is the linear layer that its tensors make alone, bit for bit, and has its gradients."""

import pytest
import torch

from peft_lrqat.ops import expert_weights
from peft_lrqat.ops.linear import linear_weight
from tests.experts import E, Stack, stack
from tests.problems import BY_CHANNEL, GRANULARITY, assert_close, plain_weight

LISTS = {"all": None, "one": [1], "some": [2, 0], "twice": [2, 2], "none": []}
SMALL = {"rows": 7, "cols": 27}


def listed(name: str) -> torch.Tensor | None:
    return None if LISTS[name] is None else torch.tensor(LISTS[name], dtype=torch.int64)


def check_weights(s: Stack, name: str, dtype: torch.dtype = torch.float32) -> None:
    experts = listed(name)
    found = expert_weights(*s.tensors, experts, *s.constants, dtype)
    which = list(range(E)) if experts is None else experts.tolist()
    alone = [linear_weight(*s.expert(e), *s.constants[1:], dtype) for e in which]
    assert found.dtype == dtype
    assert found.shape == (len(which), *s.shape)
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    grad = torch.randn(found.shape)
    names = list(s.leaves)
    gradients = torch.autograd.grad(found, list(s.leaves.values()), grad.to(dtype))
    truth = s.zeros()
    for place, e in enumerate(which):
        p = s.problem(e)
        parts = torch.autograd.grad(plain_weight(p), [p.leaves[n] for n in names], grad[place])
        s.add(truth, e, dict(zip(names, parts, strict=True)))
    for n, gradient in zip(names, gradients, strict=True):
        if which:
            assert truth[n].any()
        assert_close(gradient, truth[n], n)


@pytest.mark.parametrize("group_size", GRANULARITY)
@pytest.mark.parametrize("name", LISTS)
def test_weights_and_every_gradient(group_size, name):
    check_weights(stack(4, group_size, symmetric=name in ("all", "twice"), **SMALL), name)


@pytest.mark.parametrize(("bits", "downcast"), [(2, "int"), (3, "int"), (4, "int"), (8, "int"), (4, "bf16")])
def test_every_stored_base(bits, downcast):
    check_weights(stack(bits, 9, False, downcast, **SMALL), "some")


def test_fixed_scales_and_no_adapter():
    s = stack(**SMALL)
    fixed = expert_weights(s.base, s.scale0, None, None, s.A, s.B, None, *s.constants, torch.float32)
    assert fixed.requires_grad
    bare = expert_weights(s.base, s.scale0, None, None, None, None, None, *s.constants, torch.float32)
    assert not bare.requires_grad
    for e in range(E):
        base, scale0, _, _, A, B = s.expert(e)
        assert torch.equal(fixed[e], linear_weight(base, scale0, None, None, A, B, *s.constants[1:], torch.float32))
        assert torch.equal(
            bare[e], linear_weight(base, scale0, None, None, None, None, *s.constants[1:], torch.float32)
        )
    (gradient,) = torch.autograd.grad(fixed.sum(), s.A)
    assert gradient.any()


def test_opcheck():
    for group_size, experts in ((9, listed("some")), (BY_CHANNEL, None)):
        s = stack(4, group_size, group_size == BY_CHANNEL, **SMALL)
        args = (*s.tensors, experts, *s.constants, torch.float32)
        torch.library.opcheck(torch.ops.peft_lrqat.expert_weights.default, args)


def test_low_precision_is_rounded_once():
    s = stack(4, 9, **SMALL)
    exact, low = (expert_weights(*s.tensors, None, *s.constants, t) for t in (torch.float32, torch.bfloat16))
    assert torch.equal(low, exact.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(expert_weights(*s.tensors, None, *s.constants, torch.bfloat16), low)


def test_second_derivatives_are_refused():
    s = stack(**SMALL)
    weights = expert_weights(*s.tensors, None, *s.constants, torch.float32)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(weights.square().sum(), s.A, create_graph=True)


def test_nothing_weight_sized_in_float_is_kept_for_backward():
    s = stack(4, 9, **SMALL)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        expert_weights(*s.tensors, None, *s.constants, torch.float32)
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in s.tensors if t is not None)
