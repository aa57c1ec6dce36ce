"""The Triton kernels against the references: on a GPU where there is one, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat.chunks import row_chunks
from peft_lrqat.grid import Grid, GridTensor, snap_scale
from peft_lrqat.modules.packed import QuantizedLinear
from peft_lrqat.ops import kernels, use_kernels
from peft_lrqat.ops.factors import round_factors
from peft_lrqat.ops.reference import build_weight, rounded_levels
from peft_lrqat.ops.stored_base import DOWNCASTS, BaseFormat, encode_base
from tests.problems import Problem, gradients, ours, plain, problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = [(bits, downcast) for bits in (2, 3, 4, 8) for downcast in DOWNCASTS if (bits, downcast) != (8, "fx8")]
GRANULARITY = (9, -1, 0)


def on_device(p: Problem) -> Problem:
    for name in ("x", "base", "scale0", "shift", "zero_point", "A", "B", "bias", "dy"):
        tensor = getattr(p, name)
        if tensor is not None:
            setattr(p, name, tensor.detach().to(DEVICE).requires_grad_(tensor.requires_grad))
    return p


def both(p: Problem) -> tuple[dict, dict]:
    """Output and gradients, by kernels and by the reference formula in fp32 under autograd."""
    with use_kernels(True):
        y = ours(p)
        found = {"y": y, **gradients(y, p)}
    y = plain(p)
    return found, {"y": y, **gradients(y, p)}


def check(p: Problem, rtol: float = 2e-5) -> None:
    found, truth = both(on_device(p))
    for name, exact in truth.items():
        assert found[name].shape == exact.shape, name
        assert found[name].dtype == exact.dtype, name
        assert torch.isfinite(found[name]).all(), name
        assert (found[name] - exact).abs().max() <= rtol * exact.abs().max() + 1e-7, name
        assert exact.abs().max() > 0, name


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", GRANULARITY)
@pytest.mark.parametrize(("bits", "downcast"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_is_the_reference_bit_for_bit(bits, downcast, group_size, symmetric, dtype):
    p = problem(bits, group_size, symmetric, downcast, clip="many")
    fmt, scale = BaseFormat(bits, p.x.shape[-1], downcast), p.scale.detach()
    A, B = p.A.detach(), p.B.detach()
    expected = build_weight(p.base, scale, p.zero_point, round_factors(A, B, 0.3), fmt, dtype)
    bare = build_weight(p.base, p.scale0, p.zero_point, None, fmt, dtype)
    p = on_device(p)

    def found(*operands):
        prepared = kernels.prepare(p.scale0, *operands, p.base.shape[0])
        return kernels.build_weight(p.base, p.scale0.shape[1], p.zero_point, prepared, fmt, dtype).cpu()

    assert torch.equal(found(p.shift.detach(), "auto", p.A.detach(), p.B.detach(), 0.3), expected)
    assert torch.equal(found(None, "auto", None, None, 1.0), bare)


@pytest.mark.parametrize(("bits", "downcast"), [*((bits, "int") for bits in range(2, 9)), (4, "fx8")])
def test_programs_that_work_on_several_tiles(monkeypatch, bits, downcast):
    rows, cols = 256, 256
    monkeypatch.setattr(kernels.tiles, "ENOUGH_PROGRAMS", 2)
    for cached in ("tiling", "_launch"):
        monkeypatch.setattr(kernels.weight, cached, getattr(kernels.weight, cached).__wrapped__)
    tiles = kernels.tiles.tiling.__wrapped__(rows, cols, 1)
    assert tiles.loop == 8
    levels, fmt = (torch.rand(rows, cols) - 0.5) * 2.2 * 2 ** (bits - 1), BaseFormat(bits, cols, downcast)
    base, scale = encode_base(levels, bits, downcast), torch.rand(rows, 1)
    A, B = torch.randn(4, cols), torch.randn(rows, 4) * (torch.arange(rows) % 50 == 7).unsqueeze(1)
    factors = round_factors(A, B, 0.5)
    flags = torch.full((tiles.columns * tiles.rows,), 7, dtype=torch.int32, device=DEVICE)
    prepared = kernels.prepare(scale.to(DEVICE), None, "auto", A.to(DEVICE), B.to(DEVICE), 0.5, rows)
    found = kernels.build_weight(base.to(DEVICE), 1, None, prepared, fmt, torch.bfloat16, flags)
    assert torch.equal(found.cpu(), build_weight(base, scale, None, factors, fmt, torch.bfloat16))
    levels = rounded_levels(base, factors, fmt)
    clipped = ((levels < -(2 ** (bits - 1))) | (levels > 2 ** (bits - 1) - 1)).view(8, 32, 2, 128).any(3).any(1)
    assert torch.equal(flags.cpu().view(8, 2) == 1, clipped)
    assert 0 < clipped.float().mean() < 1


@pytest.mark.parametrize("group_size", GRANULARITY)
@pytest.mark.parametrize(
    ("bits", "downcast"), [(2, "int"), (3, "int"), (4, "fx8"), (4, "int"), (8, "int"), (4, "bf16")]
)
@pytest.mark.parametrize("clip", ["none", "few", "many"])
def test_output_and_every_gradient(bits, downcast, group_size, clip):
    p = problem(bits, group_size, bits > 2, downcast, clip=clip, bias=clip == "none")
    p.c = 0.5 if clip == "none" else 1.0
    check(p)


@pytest.mark.parametrize(("rows", "cols"), [(1, 45), (33, 9), (67, 130), (2, 18), (130, 261)])
@pytest.mark.parametrize("group_size", [9, -1])
def test_odd_shapes(rows, cols, group_size):
    if cols % 9 and group_size == 9:
        group_size = cols
    check(problem(4, group_size, False, "int", clip="many", rows=rows, cols=cols, shape=(35,)))


@pytest.mark.parametrize("rank", [1, 16, 33, 70])
def test_ranks(rank):
    p = problem(rows=20, cols=40)
    p.A, p.B = (torch.randn(rank, 40) * 0.1).requires_grad_(), torch.randn(20, rank).requires_grad_()
    check(p)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("group_size", GRANULARITY)
def test_wanted_gradients_only(deterministic, group_size):
    torch.use_deterministic_algorithms(True, warn_only=not deterministic)
    for wanted in (("x",), ("shift",), ("A", "B"), ("A", "B", "shift")):
        p = on_device(problem(group_size=group_size))
        for name, leaf in p.leaves.items():
            leaf.requires_grad_(name in wanted)
        leaves = [p.leaves[name] for name in wanted]
        with use_kernels(True):
            found = torch.autograd.grad(ours(p), leaves, p.dy)
        for a, b in zip(found, torch.autograd.grad(plain(p), leaves, p.dy), strict=True):
            assert (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", GRANULARITY)
@pytest.mark.parametrize("clip", ["none", "few"])
def test_low_precision_is_as_good_as_the_formula_in_low_precision(dtype, group_size, clip):
    low = on_device(problem(4, group_size, True, clip=clip, shape=(200,)).to(dtype))
    exact = low.to(torch.float32)
    y = plain(exact)
    truth = {"y": y, **gradients(y, exact)}
    y = plain(low, dtype)
    usual = {"y": y, **gradients(y, low)}
    with use_kernels(True):
        y = ours(low)
        found = {"y": y, **gradients(y, low)}
    for name, true in truth.items():
        assert found[name].dtype == usual[name].dtype
        ours_off, usual_off = (((v[name].float() - true).norm() / true.norm()).item() for v in (found, usual))
        assert ours_off <= usual_off + torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_leaves_every_number_alone(dtype):
    p = on_device(problem(4, -1, True, clip="few", shape=(20,)).to(dtype))
    with use_kernels(True):
        y = ours(p)
        expected = {"y": y, **gradients(y, p)}
        with torch.autocast(DEVICE, torch.bfloat16):
            y = ours(p)
            found = {"y": y, **gradients(y, p)}
    for name, values in expected.items():
        if DEVICE == "cuda" and name in ("A", "B"):  # shares of clipped entries are added in any order
            assert (found[name] - values).abs().max() <= 1e-5 * values.abs().max(), name
        else:
            assert torch.equal(found[name], values), name


@pytest.mark.parametrize("rank", [1, 5, 32, 100])
def test_factors_are_the_reference_bit_for_bit(rank):
    A, B = torch.randn(rank, 300) * torch.rand(300), torch.randn(200, rank) * 1e-3
    A[:, 7], B[3], A[0, 8] = 0.0, 0.0, 1e12
    near = round_factors(A, B, 16.0)
    scale0 = torch.ones(200, 1, device=DEVICE)
    found = kernels.prepare(scale0, None, "auto", A.to(DEVICE), B.to(DEVICE), 16.0, 200, torch.float32)
    assert torch.equal(found.a_low.cpu(), near.A)
    assert torch.equal(found.b_low.cpu(), near.B)
    buffer, at = found.buffer.cpu(), found.offsets
    integers = buffer.view(torch.float16)
    a = integers[2 * at.a_int :][: rank * 300].view(rank, 300).float() * buffer[at.a_step :][:300]
    b = integers[2 * at.b_int :][: rank * 200].view(200, rank).float() * buffer[at.b_step :][:200, None]
    assert torch.equal(a, near.A)
    assert torch.equal(b, near.B)


@pytest.mark.parametrize("scale_dtype", ["auto", "bf16", "fp16", "fp32"])
def test_scale_is_the_reference_bit_for_bit(scale_dtype):
    scale0 = torch.cat([torch.rand(5000) * 10.0 ** torch.randint(-9, 5, (5000,)), torch.tensor([0.0, 1e-30, 1e9])])
    shift = torch.randn(5003) * 0.3
    found = kernels.prepare(scale0.to(DEVICE)[:, None], shift.to(DEVICE), scale_dtype, None, None, 1.0, 5003)
    expected = snap_scale(scale0 * (1 + shift), scale_dtype)
    if DEVICE == "cpu" and scale_dtype == "fp16":  # the interpreter's fp16 has subnormals of its own
        expected, found = expected[expected > 1e-4], found.scale[:5003][expected > 1e-4]
        assert torch.equal(found, expected)
    else:
        assert torch.equal(found.scale.cpu()[:5003], expected)


def test_not_finite_operands_reach_the_loss():
    p = on_device(problem())
    for name in ("A", "B", "shift"):
        bad = p.leaves[name].detach().clone()
        bad[0, 0] = float("nan")
        with use_kernels(True):
            y = ours(replace(p, **{name: bad}))
        assert y.isnan().any(), name


def test_no_tokens_and_views():
    p = on_device(problem(shape=(0,)))
    with use_kernels(True):
        for gradient in gradients(ours(p), p).values():
            assert not gradient.any()
    p = problem(shape=(6, 4))
    p.x = torch.randn(p.x.shape[-1], 4, 6).permute(2, 1, 0).requires_grad_()
    p.dy = torch.ones(()).expand(p.dy.shape)
    check(p)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", GRANULARITY)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_merged_layer_is_the_trained_one(bits, group_size, symmetric):
    """The buffers of a checkpoint reach the kernel with its own strides: zero points are packed along the rows."""
    p = on_device(problem(bits, group_size, symmetric, "int", shape=(5,), bias=False))
    fmt, scale = BaseFormat(bits, p.x.shape[-1], "int"), p.scale.detach()
    codes = rounded_levels(p.base, None, fmt).clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1).to(torch.int8)
    grid = Grid(bits, group_size, symmetric)
    layer = QuantizedLinear(GridTensor(codes, scale, p.zero_point, grid), None, bits, torch.float32)
    with use_kernels(True):
        out = layer(p.x)
    assert torch.equal(out, torch.nn.functional.linear(p.x, layer.weight))


@pytest.mark.skipif(DEVICE == "cpu", reason="there is nothing to synchronise with")
@pytest.mark.parametrize("group_size", [32, -1])
def test_no_synchronisation(group_size):
    p = on_device(problem(group_size=group_size, rows=256, cols=256, shape=(64,)).to(torch.bfloat16))
    with use_kernels(True):
        gradients(ours(p), p)
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradients(ours(p), p)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_chunks_do_not_change_codes():
    p = problem(rows=300, cols=64, clip="many")
    fmt = BaseFormat(4, 64, "fx8")
    factors = round_factors(p.A.detach(), p.B.detach())
    whole = build_weight(p.base, p.scale.detach(), None, factors, fmt, torch.float32)
    for rows in row_chunks(300, 1 << 12, torch.device("cpu")):
        part = build_weight(p.base[rows], p.scale.detach()[rows], None, factors.rows(rows), fmt, torch.float32)
        assert torch.equal(part, whole[rows])
