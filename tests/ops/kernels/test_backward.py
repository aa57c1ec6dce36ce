"""Every gradient by the kernels against autograd through the plain formula, and against the reference."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat.ops import kernels, reference, use_kernels
from tests.problems import (
    BY_CHANNEL,
    DEVICE,
    GRANULARITY,
    Problem,
    assert_close,
    check_low_precision,
    gradients,
    ours,
    plain,
    problem,
    results,
)
from tests.problems import check as check_formula


def check(p: Problem) -> None:
    with use_kernels(True):
        check_formula(p.there())


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


#: From 4 bits on the backward goes by rows where a scale serves a row, below by G. All of those ways; how else a base
#: is stored is `test_weight.py`'s business, and takes turns here.
WAYS = [
    (bits, size, clip) for bits in ((2, "int"), (4, "fx8")) for size in GRANULARITY for clip in ("none", "few", "many")
]
OTHERS = [
    (kind, size, clip)
    for kind in ((3, "int"), (4, "int"), (4, "bf16"), (8, "int"))
    for size, clip in ((-1, "few"), (9, "many"))
]


@pytest.mark.parametrize(("kind", "group_size", "clip"), [*WAYS, *OTHERS])
def test_output_and_every_gradient(kind, group_size, clip):
    bits, downcast = kind
    p = problem(bits, group_size, bits > 2, downcast, clip=clip, bias=clip == "none")
    p.c = 0.5 if clip == "none" else 1.0
    check(p)


#: x, shift, A and B; and whether Y was kept
NEEDS = [
    ((False, False, False), True),
    ((True, False, False), True),
    ((False, True, False), True),
    ((False, False, True), True),
    ((True, True, True), True),
    ((True, True, True), False),
]


@pytest.mark.parametrize(
    ("group_size", "symmetric", "deterministic"),
    [
        (9, False, False),
        (BY_CHANNEL, False, False),
        (BY_CHANNEL, True, True),
        (-1, True, False),
        (-1, False, True),
        (0, False, False),
        (0, True, True),
    ],
)
def test_kernel_and_reference_return_the_same(group_size, symmetric, deterministic):
    """Whatever is asked for: the same fields, shapes and dtypes, all finished (c and s0 are in), the rest None."""
    torch.use_deterministic_algorithms(True, warn_only=not deterministic)
    p = problem(4, group_size, symmetric, clip="few").there()
    p.c = 0.3
    operands = [t if t is None else t.detach() for t in (p.base, p.scale0, p.shift, p.zero_point, p.A, p.B)]
    dy, x = p.dy.flatten(0, 1), p.x.detach().flatten(0, 1)
    y = x @ reference.linear_weight(*operands, p.c, p.fmt, "auto", x.dtype).t()
    for needs, kept in NEEDS:
        found, expected = (
            code.linear_backward(dy, x, y if kept else None, *operands, p.c, p.fmt, "auto", *needs)
            for code in (kernels, reference)
        )
        asked = dict(zip(expected._fields, (*needs, needs[2]), strict=True))
        for name, value in expected._asdict().items():
            assert (value is not None) == (getattr(found, name) is not None) == asked[name], name
            if value is not None:
                assert_close(getattr(found, name), value, name)


@pytest.mark.parametrize(
    ("rows", "cols", "group_size"),
    [
        *((rows, cols, 9) for rows, cols in ((1, 45), (33, 9), (2, 18), (66, 27))),
        *((rows, cols, -1) for rows, cols in ((1, 45), (33, 9), (67, 130), (130, 261))),
        *((rows, cols, BY_CHANNEL) for rows, cols in ((1, 45), (33, 18), (66, 27))),
    ],
)
def test_odd_shapes(rows, cols, group_size):
    check(problem(4, group_size, False, "int", clip="many", rows=rows, cols=cols, shape=(35,)))


@pytest.mark.parametrize("rank", [1, 16, 33, 70])
def test_ranks(rank):
    p = problem(rows=20, cols=40)
    p.A, p.B = (torch.randn(rank, 40) * 0.1).requires_grad_(), torch.randn(20, rank).requires_grad_()
    check(p)


def test_rank_zero_has_gradients_without_entries():
    p = problem(shape=(5,)).there()
    p.A, p.B = (t.detach().requires_grad_() for t in (p.A[:0], p.B[:, :0]))
    with use_kernels(True):
        found, truth = results(ours(p), p), results(plain(p), p)
    for name, exact in truth.items():
        assert_close(found[name], exact, name)


@pytest.mark.parametrize(("group_size", "deterministic"), [(9, False), (-1, False), (0, True)])
def test_wanted_gradients_only(group_size, deterministic):
    torch.use_deterministic_algorithms(True, warn_only=not deterministic)
    for wanted in (("x",), ("shift",), ("A", "B"), ("A", "B", "shift")):
        p = problem(group_size=group_size).there()
        for name, leaf in p.leaves.items():
            leaf.requires_grad_(name in wanted)
        leaves = [p.leaves[name] for name in wanted]
        with use_kernels(True):
            found = torch.autograd.grad(ours(p), leaves, p.dy)
        for a, b in zip(found, torch.autograd.grad(plain(p), leaves, p.dy), strict=True):
            assert_close(a, b)


@pytest.mark.parametrize(("clip", "dtype"), [("none", torch.float16), ("few", torch.bfloat16), ("few", torch.float16)])
@pytest.mark.parametrize("group_size", GRANULARITY)
def test_low_precision_is_as_good_as_the_formula_in_low_precision(group_size, clip, dtype):
    low = problem(4, group_size, True, clip=clip, shape=(200,)).to(dtype).there()
    with use_kernels(True):
        check_low_precision(low, slack=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_leaves_every_number_alone(dtype):
    p = problem(4, -1, True, clip="few", shape=(20,)).to(dtype).there()
    with use_kernels(True):
        expected = results(ours(p), p)
        with torch.autocast(DEVICE, torch.bfloat16):
            found = results(ours(p), p)
    for name, values in expected.items():
        if DEVICE == "cuda" and name in ("A", "B"):  # shares of clipped entries are added in any order
            assert (found[name] - values).abs().max() <= 1e-5 * values.abs().max(), name
        else:
            assert torch.equal(found[name], values), name


def test_not_finite_operands_reach_the_loss():
    p = problem().there()
    for name in ("A", "B", "shift"):
        bad = p.leaves[name].detach().clone()
        bad[0, 0] = float("nan")
        with use_kernels(True):
            y = ours(replace(p, **{name: bad}))
        assert y.isnan().any(), name


def test_no_tokens_and_views():
    p = problem(shape=(0,)).there()
    with use_kernels(True):
        for gradient in gradients(ours(p), p).values():
            assert not gradient.any()
    p = problem(shape=(6, 4))
    p.x = torch.randn(p.x.shape[-1], 4, 6).permute(2, 1, 0).requires_grad_()
    p.dy = torch.ones(()).expand(p.dy.shape)
    check(p)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is nothing to synchronise with")
@pytest.mark.parametrize("group_size", [32, -1, BY_CHANNEL])
def test_no_synchronisation(group_size):
    p = (
        problem(group_size=group_size, rows=256, cols=252 if group_size == BY_CHANNEL else 256, shape=(64,))
        .to(torch.bfloat16)
        .there()
    )
    with use_kernels(True):
        gradients(ours(p), p)
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradients(ours(p), p)
        finally:
            torch.cuda.set_sync_debug_mode("default")
