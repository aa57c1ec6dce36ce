"""W^ by the kernel is the reference's, bit for bit."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat.grid import GridTensor
from peft_lrqat.modules.packed import QuantizedLinear
from peft_lrqat.ops import kernels, reference, use_kernels
from peft_lrqat.ops.factors import round_factors
from peft_lrqat.ops.kernels import tiles as tiling_of
from peft_lrqat.ops.kernels import weight
from peft_lrqat.ops.kernels.prepare import prepare
from peft_lrqat.ops.reference import build_weight, rounded_levels
from peft_lrqat.ops.stored_base import BaseFormat, encode_base
from tests.problems import BY_CHANNEL, DEVICE, GRANULARITY, KINDS, problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [size for size in GRANULARITY if size != BY_CHANNEL]  # where the adapter's units play no part
TURNS = [(symmetric, dtype) for symmetric in (True, False) for dtype in DTYPES]


def check(bits: int, group_size: int | str, symmetric: bool, downcast: str, dtype: torch.dtype) -> None:
    p = problem(bits, group_size, symmetric, downcast, clip="many")
    q = p.there()
    for adapter in (True, False):
        operands = [
            (r.base, r.scale0, r.shift.detach(), r.zero_point, r.A.detach(), r.B.detach(), 0.3)
            if adapter
            else (r.base, r.scale0, None, r.zero_point, None, None, 1.0)
            for r in (p, q)
        ]
        expected = reference.linear_weight(*operands[0], p.fmt, "auto", dtype)
        found = kernels.linear_weight(*operands[1], p.fmt, "auto", dtype)
        assert found.dtype == dtype
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("group_size", SIZES)
@pytest.mark.parametrize("number", range(len(KINDS)), ids=lambda n: f"{KINDS[n][0]}-{KINDS[n][1]}")
def test_every_stored_base(number, group_size):
    """Where a group starts decides which bits of a word are read. Zero points and dtypes come later, and take turns."""
    bits, downcast = KINDS[number]
    symmetric, dtype = TURNS[number % len(TURNS)]
    check(bits, group_size, symmetric, downcast, dtype)


@pytest.mark.parametrize(("symmetric", "dtype"), TURNS)
@pytest.mark.parametrize("group_size", GRANULARITY)
def test_every_scale_zero_point_and_dtype(group_size, symmetric, dtype):
    check(4, group_size, symmetric, "fx8", dtype)


@pytest.mark.parametrize(("rows", "cols"), [(1, 9), (33, 36), (34, 99)])
@pytest.mark.parametrize("downcast", ["fx8", "int"])
def test_by_channel_at_odd_shapes(rows, cols, downcast):
    """A quotient, a product and a sum, each rounded on its own: half of the weights move, so a tie would show."""
    p = problem(4, BY_CHANNEL, False, downcast, clip="many", rows=rows, cols=cols)
    with torch.no_grad():
        p.scale0 *= 10 ** torch.randn(p.scale0.shape)  # groups of very different size
        p.B *= 0.2
    operands = [
        (r.base, r.scale0, r.shift.detach(), r.zero_point, r.A.detach(), r.B.detach(), 0.3) for r in (p, p.there())
    ]
    expected = reference.linear_weight(*operands[0], p.fmt, "auto", torch.float32)
    assert torch.equal(kernels.linear_weight(*operands[1], p.fmt, "auto", torch.float32).cpu(), expected)


def test_by_channel_the_product_with_the_units_is_rounded_before_the_sum():
    """At these weights one operation with one rounding would give another code."""
    rows = 64
    scale0, A = torch.stack([torch.rand(rows) * 0.3 + 0.05, torch.ones(rows)], 1), torch.tensor([[1.0, 0.0]])
    units = 1 / scale0[:, :1]
    A, B, _ = round_factors(A, (torch.rand(rows, 1) + 1) * 8 / units)
    base = torch.cat([0.5 - B * units, torch.zeros(rows, 1)], 1)  # a tie, once the product is rounded
    at_once = (base[:, 0].double() + B[:, 0].double() * units[:, 0].double()).round()
    shift, fmt = torch.zeros(rows, 1), BaseFormat(8, 2, "fp32")
    operands = (encode_base(base, 8, "fp32"), scale0, shift, None, A, B)
    found = kernels.linear_weight(
        *(None if t is None else t.to(DEVICE) for t in operands), 1.0, fmt, "fp32", torch.float32
    )
    assert not found[:, 0].any()
    assert at_once.any()
    assert torch.equal(found.cpu(), reference.linear_weight(*operands, 1.0, fmt, "fp32", torch.float32))


@pytest.mark.parametrize(("bits", "downcast"), [*((bits, "int") for bits in range(2, 9)), (4, "fx8")])
def test_programs_that_work_on_several_tiles(monkeypatch, bits, downcast):
    rows, cols = 256, 256
    monkeypatch.setattr(tiling_of, "ENOUGH_PROGRAMS", 2)
    for cached in ("tiling", "_launch"):
        monkeypatch.setattr(weight, cached, getattr(weight, cached).__wrapped__)
    tiles = tiling_of.tiling.__wrapped__(rows, cols, 1)
    assert tiles.loop == 8
    levels, fmt = (torch.rand(rows, cols) - 0.5) * 2.2 * 2 ** (bits - 1), BaseFormat(bits, cols, downcast)
    base, scale = encode_base(levels, bits, downcast), torch.rand(rows, 1)
    A, B = torch.randn(4, cols), torch.randn(rows, 4) * (torch.arange(rows) % 50 == 7).unsqueeze(1)
    factors = round_factors(A, B, 0.5)
    flags = torch.full((tiles.columns * tiles.rows,), 7, dtype=torch.int32, device=DEVICE)
    prepared = prepare(scale.to(DEVICE), None, "auto", A.to(DEVICE), B.to(DEVICE), 0.5, rows)
    found = weight.prepared_weight(base.to(DEVICE), 1, None, prepared, fmt, torch.bfloat16, flags)
    assert torch.equal(found.cpu(), build_weight(base, scale, None, factors, fmt, torch.bfloat16))
    levels = rounded_levels(base, factors, fmt)
    clipped = ((levels < fmt.qmin) | (levels > fmt.qmax)).view(8, 32, 2, 128).any(3).any(1)
    assert torch.equal(flags.cpu().view(8, 2) == 1, clipped)
    assert 0 < clipped.float().mean() < 1


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    [
        *((bits, size, False) for bits in (2, 3, 4, 8) for size in SIZES),
        *((4, size, True) for size in SIZES),
    ],
)
def test_a_merged_layer_is_the_trained_one(bits, group_size, symmetric):
    """The buffers of a checkpoint reach the kernel with its own strides: zero points are packed along the rows."""
    p = problem(bits, group_size, symmetric, "int", shape=(5,)).there()
    weight = (
        reference.codes(p.base, None, None, p.fmt),
        p.scale.detach(),
        p.zero_point,
        p.grid,
    )
    layer = QuantizedLinear(GridTensor(*weight), None, bits, torch.float32)
    with use_kernels(True):
        out = layer(p.x)
    assert torch.equal(out, torch.nn.functional.linear(p.x, layer.weight))
