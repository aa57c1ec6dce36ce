"""The linear layer with the adapter inside the rounding, by the reference: against autograd, and as torch sees it."""

import pytest
import torch

from peft_lrqat import chunks
from peft_lrqat.grid import Grid, snap_scale
from peft_lrqat.ops import quantized_linear, reference, trained_scale
from peft_lrqat.ops.stored_base import encode_base
from peft_lrqat.ranges import choose_range
from tests.models import adapted, tiny
from tests.problems import (
    BY_CHANNEL,
    COLS,
    GRANULARITY,
    KINDS,
    ROWS,
    Problem,
    assert_close,
    check,
    check_low_precision,
    gradients,
    ours,
    plain,
    plain_weight,
    problem,
    results,
)


@pytest.mark.parametrize("number", range(len(KINDS)), ids=lambda n: f"{KINDS[n][0]}-{KINDS[n][1]}")
@pytest.mark.parametrize("clip", ["few", "many"])
def test_every_stored_base(number, clip):
    """The other axes take turns: a decoded base is a matrix of levels (see `tests/problems.py`)."""
    bits, downcast = KINDS[number]
    turn = number + (clip == "many")
    check(problem(bits, GRANULARITY[turn % len(GRANULARITY)], turn % 2 == 0, downcast, clip=clip, bias=number % 4 < 2))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", GRANULARITY)
class TestEveryWayThroughBackward:
    """Who shares a scale, whether entries are clipped and whether Y was kept (no bias) decide the way; all of them."""

    @pytest.mark.parametrize("clip", ["few", "many"])
    @pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
    def test_output_and_every_gradient(self, group_size, symmetric, clip, bias):
        check(problem(4, group_size, symmetric, clip=clip, bias=bias))

    def test_without_adapter(self, group_size, symmetric):
        p = problem(3, group_size, symmetric, "fp32")
        p.A = p.B = None
        before = p.base.clone()
        check(p)
        assert torch.equal(p.base, before)


@pytest.mark.parametrize(("chunk", "clip"), [(1, "many"), (100, "few"), (100, "many"), (300, "few")])
@pytest.mark.parametrize("group_size", GRANULARITY)
def test_several_row_chunks(monkeypatch, group_size, chunk, clip):
    monkeypatch.setattr(chunks, "CPU_CHUNK", chunk)
    assert len(list(chunks.row_chunks(ROWS, COLS, torch.device("cpu")))) > 1
    check(problem(group_size=group_size, symmetric=False, clip=clip))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 2)])
@pytest.mark.parametrize("group_size", GRANULARITY)
def test_input_shapes(shape, group_size):
    check(problem(group_size=group_size, shape=shape, bias=True))
    check(problem(group_size=group_size, shape=shape))


@pytest.mark.parametrize(("rows", "cols"), [(1, 45), (33, 9), (7, 99), (2, 18)])
def test_odd_weight_shapes(rows, cols):
    check(problem(3, 9, False, "int", clip="many", rows=rows, cols=cols))
    check(problem(3, -1, True, "int", clip="many", rows=rows, cols=cols))


@pytest.mark.parametrize("group_size", GRANULARITY)
def test_no_tokens(group_size):
    p = problem(group_size=group_size, shape=(0,), bias=True)
    y = ours(p)
    assert y.shape == (0, ROWS)
    for gradient in gradients(y, p).values():
        assert not gradient.any()


def test_views_and_expanded_gradients():
    p = problem(shape=(6, 4))
    p.x = torch.randn(COLS, 4, 6).permute(2, 1, 0).requires_grad_()
    p.dy = torch.ones(()).expand(6, 4, ROWS)
    check(p)


@pytest.mark.parametrize(
    ("group_size", "clip", "by_G"),
    [(-1, "few", 0), (0, "few", 0), (-1, "many", 1), (9, "few", 1), (BY_CHANNEL, "few", 0), (BY_CHANNEL, "many", 1)],
)
def test_both_ways_through_backward_are_taken(monkeypatch, group_size, clip, by_G):
    calls = []
    whole = reference._by_G
    monkeypatch.setattr(reference, "_by_G", lambda *args: calls.append(1) or whole(*args))
    check(problem(group_size=group_size, clip=clip))
    assert len(calls) == by_G


@pytest.mark.parametrize("wanted", [("x",), ("shift",), ("A", "B"), ("bias",), ("x", "bias"), ("A", "B", "shift")])
@pytest.mark.parametrize("group_size", GRANULARITY)
def test_only_what_is_asked_for(wanted, group_size):
    p = problem(group_size=group_size, bias="bias" in wanted)
    for name, leaf in p.leaves.items():
        leaf.requires_grad_(name in wanted)
    found = torch.autograd.grad(ours(p), [p.leaves[name] for name in wanted], p.dy)
    truth = torch.autograd.grad(plain(p), [p.leaves[name] for name in wanted], p.dy)
    for a, b in zip(found, truth, strict=True):
        assert_close(a, b)


def test_clipped_entries_get_no_gradient():
    p = problem(clip="few", shape=(50,))
    blocked = p.clipped()
    row, column = blocked.nonzero()[0].tolist()
    one = torch.zeros_like(p.A)
    one[:, column] = p.A.detach()[:, column]  # an adapter that reaches this column only
    p.A = one.requires_grad_()
    p.dy = torch.zeros_like(p.dy)
    p.dy[:, row] = 1.0  # and a loss that reaches this row only
    found = gradients(ours(p), p)
    assert blocked[row, column]
    assert found["A"][:, column].abs().max() <= 1e-5 * found["A"].abs().max()


@pytest.mark.parametrize(
    ("clip", "bias", "dtype"),
    [
        ("few", False, torch.bfloat16),
        ("few", True, torch.float16),
        ("many", False, torch.float16),
        ("many", True, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("group_size", GRANULARITY)
def test_low_precision_is_no_worse_than_autograd(group_size, clip, bias, dtype):
    low = problem(4, group_size, True, clip=clip, bias=bias, shape=(200,)).to(dtype)
    assert ours(low).dtype == dtype
    check_low_precision(low, slack=0.5)


def kept_for_backward(p: Problem) -> tuple[torch.Tensor, list[torch.Tensor]]:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ours(p)
    return y, kept + [t for t in y.grad_fn.weight if t is not None]


@pytest.mark.parametrize("group_size", [32, -1, 0, BY_CHANNEL])
def test_nothing_weight_sized_in_float_is_kept_for_backward(group_size):
    p = problem(group_size=group_size, shape=(3,), rows=96, cols=126 if group_size == BY_CHANNEL else 128)
    y, kept = kept_for_backward(p)
    assert any(t.data_ptr() == p.base.data_ptr() for t in kept)
    floats = sum(t.numel() for t in kept if t.is_floating_point())
    small = sum(t.numel() for t in (p.x, y, p.A, p.B, p.scale0, p.shift))
    assert floats <= small < 96 * p.x.shape[-1]
    assert sum(t.nbytes for t in kept if not t.is_floating_point()) == p.base.nbytes


def test_a_step_between_forward_and_backward_is_refused():
    p = problem()
    y = ours(p)
    with torch.no_grad():
        p.A += 1.0
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        y.backward(p.dy)


def test_frozen_layers_do_not_keep_their_input():
    p = problem(shape=(3,))
    for name in ("A", "B", "shift"):
        p.leaves[name].requires_grad_(False)
    _, kept = kept_for_backward(p)
    assert kept
    assert not any(t.shape == p.x.shape for t in kept)


@pytest.mark.parametrize(("group_size", "symmetric"), [(9, False), (BY_CHANNEL, True), (-1, True), (0, False)])
def test_opcheck(group_size, symmetric):
    p = problem(group_size=group_size, symmetric=symmetric, bias=True)
    torch.library.opcheck(torch.ops.peft_lrqat.quantized_linear.default, p.operands)
    p.A = p.B = p.bias = None
    torch.library.opcheck(torch.ops.peft_lrqat.quantized_linear.default, p.operands)


@pytest.mark.parametrize(
    ("group_size", "needs"),
    [
        (9, (True, True, True)),
        (BY_CHANNEL, (True, True, True)),
        (-1, (False, True, True)),
        (0, (True, False, False)),
    ],
)
def test_opcheck_backward(group_size, needs):
    p = problem(group_size=group_size)
    y = ours(p).detach()
    operands = (p.dy, p.x, y, p.base, p.scale0, p.shift, p.zero_point, p.A, p.B)
    tensors = [t if t is None else t.detach() for t in operands]
    torch.library.opcheck(
        torch.ops.peft_lrqat.quantized_linear_backward.default, (*tensors, 1.5, 4, "fx8", "auto", *needs)
    )


@pytest.mark.parametrize("scale_dtype", ["auto", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("groups", [1, 3])
def test_trained_scale(scale_dtype, groups):
    scale0, shift = torch.rand(5, 3) + 0.01, torch.randn(5, groups).mul_(0.1).requires_grad_()
    torch.library.opcheck(torch.ops.peft_lrqat.trained_scale.default, (scale0, shift, scale_dtype))
    scale = trained_scale(scale0, shift, scale_dtype)
    assert torch.equal(scale, snap_scale(scale0 * (1 + shift.detach()), scale_dtype))
    (gradient,) = torch.autograd.grad(scale.sum(), shift)
    assert torch.equal(gradient, scale0.sum_to_size(shift.shape))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_by_channel_before_the_first_step_every_gradient_is_that_of_the_formula(symmetric):
    """Scales are then as they were snapped when they were chosen, so there is one way to pass snapping through."""
    p = problem(4, BY_CHANNEL, symmetric, clip="few", shape=(50,))
    with torch.no_grad():
        p.shift.zero_()
    found, truth = (
        torch.autograd.grad(y, [p.x, p.A, p.B, p.shift], p.dy)
        for y in (ours(p), torch.nn.functional.linear(p.x, plain_weight(p, relative=False)))
    )
    for a, b in zip(found, truth, strict=True):
        assert_close(a, b)


def test_by_channel_scales_that_passed_zero_are_held_and_have_finite_gradients():
    p = problem(4, BY_CHANNEL, True, shape=(20,))
    with torch.no_grad():
        p.shift[:3, 0] = torch.tensor([-1.0, -2.0, -1e30])
    found = results(ours(p), p)
    assert (p.scale[:3].abs() == 2.0**-24).all()
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("scale_dtype", ["auto", "fp32"])
def test_by_channel_a_group_of_zeros_stays_finite(scale_dtype):
    """Its scale is the smallest there is, 1e38 times smaller than others: an adapter of 0 adds 0 there, not NaN."""
    weight = torch.randn(6, 16)
    weight[2, :8] = 0.0
    scale0, _ = choose_range(weight, Grid(4, 8), "minmax", 2.5, scale_dtype)
    base = encode_base((weight.view(6, 2, 8) / scale0.unsqueeze(-1)).view(6, 16), 4, "fx8")
    x, A = torch.randn(3, 16), torch.randn(2, 16)
    for B in (torch.zeros(6, 2), torch.randn(6, 2)):
        shift, A, B = (t.clone().requires_grad_() for t in (torch.zeros(6, 1), A, B))
        y = quantized_linear(x, base, scale0, shift, None, A, B, None, 1.0, 4, "fx8", scale_dtype)
        for gradient in (y, *torch.autograd.grad(y.sum(), [shift, A, B])):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_break(dynamic):
    p = problem(bias=True)

    def layer(x, shift, A, B, bias):
        y = quantized_linear(x, p.base, p.scale0, shift, None, A, B, bias, 2.0, 4, "fx8", "auto")
        return torch.nn.functional.silu(y)

    leaves = [p.x, p.shift, p.A, p.B, p.bias]
    expected = layer(*leaves)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    found = compiled(*leaves)
    assert torch.equal(found, expected)
    for a, b in zip(torch.autograd.grad(found, leaves, p.dy), torch.autograd.grad(expected, leaves, p.dy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("group_size", GRANULARITY)
def test_autocast_leaves_the_rounding_alone(group_size):
    p = problem(group_size=group_size, clip="many").to(torch.bfloat16)  # factors that bf16 would change
    y = ours(p)
    expected = gradients(y, p)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ours(p)
        found = gradients(inside, p)
    assert torch.equal(inside, y)
    for name in expected:
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    p = problem()
    expected_y = ours(p)
    expected = gradients(expected_y, p)

    def layer(x):
        return quantized_linear(x, *p.operands[1:])

    y = torch.utils.checkpoint.checkpoint(layer, p.x, use_reentrant=reentrant)
    assert torch.equal(y, expected_y)
    y.backward(p.dy)
    for name, leaf in p.leaves.items():
        assert torch.equal(leaf.grad, expected[name])


def test_an_output_that_is_changed_in_place_is_named():
    layer = adapted(tiny(num_hidden_layers=1)).base_model.model.model.layers[0].mlp.up_proj  # one scale a row
    y = layer(torch.randn(2, 3, layer.in_features))
    y += 1
    with pytest.raises(RuntimeError, match=r"changed in place.*group_size=128.*learn_scales=False"):
        y.sum().backward()
