import pytest
import torch

from peft_lrqat import chunks
from peft_lrqat.grid import Grid, snap_scale
from peft_lrqat.ops import quantized_linear, reference, trained_scale
from peft_lrqat.ops.factors import factor_bits, round_factors
from peft_lrqat.ops.reference import codes
from peft_lrqat.ops.stored_base import DOWNCASTS, BaseFormat, decode_base, encode_base
from tests.problems import COLS, ROWS, Problem, gradients, ours, plain, problem

GRANULARITY = (9, -1, 0)
KINDS = [(bits, downcast) for bits in (2, 3, 4, 8) for downcast in DOWNCASTS if (bits, downcast) != (8, "fx8")]


def assert_close(found: torch.Tensor, expected: torch.Tensor, rtol: float = 2e-5) -> None:
    """Equal up to fp32 summation order: the error is measured against the tensor's largest entry."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= rtol * expected.abs().max() + 1e-7


def check(p: Problem) -> None:
    y, expected = ours(p), plain(p)
    assert_close(y, expected)
    found, truth = gradients(y, p), gradients(expected, p)
    for name in truth:
        assert_close(found[name], truth[name])
        assert truth[name].abs().max() > 0


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", GRANULARITY)
@pytest.mark.parametrize(("bits", "downcast"), KINDS)
class TestAgainstAutograd:
    @pytest.mark.parametrize("clip", ["few", "many"])
    @pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
    def test_output_and_every_gradient(self, bits, downcast, group_size, symmetric, clip, bias):
        check(problem(bits, group_size, symmetric, downcast, clip=clip, bias=bias))

    def test_without_adapter(self, bits, downcast, group_size, symmetric):
        p = problem(bits, group_size, symmetric, downcast)
        p.A = p.B = None
        before = p.base.clone()
        check(p)
        assert torch.equal(p.base, before)


@pytest.mark.parametrize("chunk", [1, 100, 300])
@pytest.mark.parametrize("group_size", GRANULARITY)
@pytest.mark.parametrize("clip", ["few", "many"])
def test_several_row_chunks(monkeypatch, chunk, group_size, clip):
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
    ("group_size", "clip", "dense"), [(-1, "few", 0), (0, "few", 0), (-1, "many", 1), (9, "few", 1)]
)
def test_both_ways_through_backward_are_taken(monkeypatch, group_size, clip, dense):
    calls = []
    whole = reference._dense_backward
    monkeypatch.setattr(reference, "_dense_backward", lambda *args: calls.append(1) or whole(*args))
    check(problem(group_size=group_size, clip=clip))
    assert len(calls) == dense


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("clip", ["few", "many"])
@pytest.mark.parametrize("group_size", GRANULARITY)
def test_low_precision_is_no_worse_than_autograd(dtype, group_size, clip, bias):
    low = problem(4, group_size, True, clip=clip, bias=bias, shape=(200,)).to(dtype)
    y = ours(low)
    assert y.dtype == dtype
    truth_problem = low.to(torch.float32)
    truth_y, usual_y = plain(truth_problem), plain(low, dtype)
    truth = {"y": truth_y, **gradients(truth_y, truth_problem)}
    usual = {"y": usual_y, **gradients(usual_y, low)}
    found = {"y": y, **gradients(y, low)}
    for name, exact in truth.items():
        assert found[name].dtype == usual[name].dtype

        def error(values, name=name, exact=exact):
            return ((values[name].float() - exact).norm() / exact.norm()).item()

        assert error(found) <= error(usual) + 0.5 * torch.finfo(dtype).eps, name


def kept_for_backward(p: Problem) -> tuple[torch.Tensor, list[torch.Tensor]]:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ours(p)
    return y, kept + [t for t in y.grad_fn.weight if t is not None]


@pytest.mark.parametrize("group_size", [32, -1, 0])
def test_nothing_weight_sized_in_float_is_kept_for_backward(group_size):
    p = problem(group_size=group_size, shape=(3,), rows=96, cols=128)
    y, kept = kept_for_backward(p)
    assert any(t.data_ptr() == p.base.data_ptr() for t in kept)
    floats = sum(t.numel() for t in kept if t.is_floating_point())
    small = sum(t.numel() for t in (p.x, y, p.A, p.B, p.scale0, p.shift))
    assert floats <= small < 96 * 128
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


@pytest.mark.parametrize("group_size", GRANULARITY)
@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(group_size, symmetric):
    p = problem(group_size=group_size, symmetric=symmetric, bias=True)
    torch.library.opcheck(torch.ops.peft_lrqat.quantized_linear.default, p.operands)
    p.A = p.B = p.bias = None
    torch.library.opcheck(torch.ops.peft_lrqat.quantized_linear.default, p.operands)


@pytest.mark.parametrize("group_size", GRANULARITY)
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)])
def test_opcheck_backward(group_size, needs):
    p = problem(group_size=group_size)
    y = ours(p).detach()
    operands = (p.dy, p.x, y, p.base, p.scale0, p.shift, p.zero_point, p.A, p.B)
    tensors = [t if t is None else t.detach() for t in operands]
    torch.library.opcheck(
        torch.ops.peft_lrqat.quantized_linear_backward.default, (*tensors, 1.5, 4, "fx8", "auto", *needs)
    )


@pytest.mark.parametrize("scale_dtype", ["auto", "bf16", "fp16", "fp32"])
def test_trained_scale(scale_dtype):
    scale0, shift = torch.rand(5, 3) + 0.01, torch.randn(5, 3).mul_(0.1).requires_grad_()
    torch.library.opcheck(torch.ops.peft_lrqat.trained_scale.default, (scale0, shift, scale_dtype))
    scale = trained_scale(scale0, shift, scale_dtype)
    assert torch.equal(scale, snap_scale(scale0 * (1 + shift.detach()), scale_dtype))
    (gradient,) = torch.autograd.grad(scale.sum(), shift)
    assert torch.equal(gradient, scale0)


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


@pytest.fixture
def medium_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_codes_do_not_depend_on_the_matmul_precision(medium_precision):
    p = problem(rows=64, cols=128, clip="many")
    fmt = BaseFormat(4, 128, "fx8")
    A, B = p.A.detach(), p.B.detach()
    low = codes(p.base, A, B, fmt)
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # put back as it was
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(low, codes(p.base, A, B, fmt))


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


@pytest.mark.parametrize(("bits", "downcast"), KINDS)
def test_merged_codes_are_those_of_forward(bits, downcast):
    p = problem(bits, -1, False, downcast, clip="many")
    fmt = BaseFormat(bits, COLS, downcast)
    found = codes(p.base, p.A.detach(), p.B.detach(), fmt, p.c)
    assert found.dtype == torch.int8
    eye = torch.eye(COLS)
    p.x = eye
    exact = (found.float() - p.zero_point.float()) * p.scale.detach()
    assert torch.equal(ours(p).detach().t(), exact)


@pytest.mark.parametrize(("bits", "downcast"), KINDS)
def test_stored_base(bits, downcast):
    grid = Grid(bits, -1)
    levels = (torch.rand(7, 33) - 0.5) * 2**bits
    stored = encode_base(levels.clone(), bits, downcast)
    assert not stored.is_floating_point()
    assert stored.nbytes <= 7 * {"fx8": 33, "int": 36 * bits / 8 + 4, "fp32": 132}.get(downcast, 66)
    found = decode_base(stored, BaseFormat(bits, 33, downcast))
    half_step = {"fx8": 2.0 ** (bits - 9), "int": 0.5, "fp32": 0}.get(downcast, 2.0 ** (bits - 9))
    inside = levels.clamp(grid.qmin, grid.qmax)
    assert ((found - levels).abs() <= half_step + (levels - inside).abs()).all()
    found.zero_()  # a copy: whoever decodes may write into it
    assert torch.equal(stored, encode_base(levels.clone(), bits, downcast))
