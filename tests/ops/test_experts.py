"""A stack of experts: each is the linear layer that its tensors make alone, bit for bit, and has its gradients."""

import pytest
import torch

from peft_lrqat.ops import expert_weights, quantized_linear
from peft_lrqat.ops.linear import linear_weight
from tests.experts import (
    LISTS,
    ROUTES,
    E,
    check_linear,
    check_weights,
    gradients_of,
    linear,
    listed,
    routed,
    stack,
    tokens_of,
    weights,
)
from tests.problems import BY_CHANNEL, GRANULARITY

SMALL = {"rows": 7, "cols": 27}
KINDS = [(2, "int"), (3, "int"), (4, "int"), (8, "int"), (4, "bf16")]


@pytest.mark.parametrize("group_size", GRANULARITY)
@pytest.mark.parametrize("name", LISTS)
def test_weights_and_every_gradient(group_size, name):
    check_weights(stack(4, group_size, symmetric=name in ("all", "twice"), **SMALL), name)


@pytest.mark.parametrize("group_size", GRANULARITY)
@pytest.mark.parametrize("name", ROUTES)
def test_product_and_every_gradient(group_size, name):
    check_linear(stack(4, group_size, symmetric=name in ("all", "one"), **SMALL), name)


@pytest.mark.parametrize(("bits", "downcast"), KINDS)
def test_every_stored_base(bits, downcast):
    s = stack(bits, 9, False, downcast, **SMALL)
    check_weights(s, "some")
    check_linear(s, "some")


@pytest.mark.parametrize("group_size", GRANULARITY)
def test_an_expert_is_the_linear_layer_of_its_tensors_bit_for_bit(group_size):
    s = stack(4, group_size, **SMALL)
    for dtype in (torch.float32, torch.bfloat16):
        built = weights(s, None, dtype)
        assert all(torch.equal(built[e], linear_weight(*s.expert(e), *s.constants[1:], dtype)) for e in range(E))
        some = listed(s, "some")
        assert torch.equal(weights(s, some, dtype), built[some])
        x, ends, dy = routed(s, "some", dtype)
        found, gradients = s.results(linear(s, x, ends), dy, x), s.zeros()
        for e, tokens in enumerate(tokens_of(ends)):
            p = s.problem(e, x[tokens].detach().requires_grad_())
            y = quantized_linear(p.x, *p.operands[1:])
            assert torch.equal(found["y"][tokens], y)
            of_one = gradients_of(y, p, dy[tokens])
            assert torch.equal(found["x"][tokens], of_one["x"])
            s.add(gradients, e, of_one)
        assert all(torch.equal(found[name], gradients[name]) for name in s.leaves)


def test_fixed_scales_and_no_adapter():
    s = stack(**SMALL)
    for A, B in ((s.A, s.B), (None, None)):
        built = expert_weights(s.base, s.scale0, None, None, A, B, None, *s.constants, torch.float32)
        assert built.requires_grad == (A is not None)
        for e in range(E):
            base, scale0, _, _, *factors = s.expert(e)
            factors = factors if A is not None else (None, None)
            alone = linear_weight(base, scale0, None, None, *factors, *s.constants[1:], torch.float32)
            assert torch.equal(built[e], alone)
    x, ends, dy = routed(s, "some")
    s.A, s.B, s.shift = (t.detach() for t in (s.A, s.B, s.shift))
    (dx,) = torch.autograd.grad(linear(s, x, ends), x, dy)
    for e, tokens in enumerate(tokens_of(ends)):
        assert torch.equal(dx[tokens], dy[tokens] @ weights(s, None)[e])


def test_opcheck():
    for group_size, name in ((9, "some"), (BY_CHANNEL, "all")):
        s = stack(4, group_size, group_size == BY_CHANNEL, **SMALL)
        args = (*s.tensors, listed(s, name), *s.constants, torch.float32)
        torch.library.opcheck(torch.ops.peft_lrqat.expert_weights.default, args)
    x, ends, _ = routed(s, "some")
    _, *constants, _ = s.constants
    torch.library.opcheck(torch.ops.peft_lrqat.expert_linear.default, (x, ends, *s.tensors, *constants))


def test_compile_without_graph_break():
    s = stack(4, 9, **SMALL)
    x, ends, dy = routed(s, "some")
    expected = s.results(linear(s, x, ends), dy, x)
    compiled = torch.compile(lambda x, ends: linear(s, x, ends), fullgraph=True, backend="aot_eager")
    for name, value in s.results(compiled(x, ends), dy, x).items():
        assert torch.equal(value, expected[name]), name


def test_autocast_and_checkpointing_change_nothing():
    s = stack(4, 9, **SMALL)
    assert torch.equal(weights(s, None, torch.bfloat16), weights(s, None).bfloat16())
    x, ends, dy = routed(s, "some", torch.bfloat16)
    expected = s.results(linear(s, x, ends), dy, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.utils.checkpoint.checkpoint(lambda x: linear(s, x, ends), x, use_reentrant=False)
        built = weights(s, None, torch.bfloat16)
    assert torch.equal(built, weights(s, None, torch.bfloat16))
    for name, value in s.results(y, dy, x).items():
        assert torch.equal(value, expected[name]), name


def test_second_derivatives_are_refused():
    s = stack(**SMALL)
    x, ends, _ = routed(s, "some")
    for y in (weights(s, None), linear(s, x, ends)):
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(y.square().sum(), s.A, create_graph=True)


@pytest.mark.parametrize("group_size", [9, -1])
def test_nothing_weight_sized_in_float_is_kept_for_backward(group_size):
    s = stack(4, group_size, **SMALL)
    x, ends, _ = routed(s, "some")
    own = [t for t in s.tensors if t is not None]
    for run, beside in ((lambda: weights(s, None), []), (lambda: linear(s, x, ends), [x, ends])):
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = run()
        keeps_y = group_size == -1 and bool(beside)
        assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in (*own, *beside, *([y] if keeps_y else [])))
