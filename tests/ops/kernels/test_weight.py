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
from tests.problems import DEVICE, GRANULARITY, KINDS, problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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


@pytest.mark.parametrize("group_size", GRANULARITY)
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
        *((bits, size, False) for bits in (2, 3, 4, 8) for size in GRANULARITY),
        *((4, size, True) for size in GRANULARITY),
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
