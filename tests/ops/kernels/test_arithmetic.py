"""Arithmetic in few instructions is the plain one, bit for bit: on a GPU, where it differs from the interpreter's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

import triton
import triton.language as tl

from peft_lrqat import rounding
from peft_lrqat.ops.kernels import arithmetic
from peft_lrqat.packing import pack
from tests.problems import DEVICE

SIZE = 4096


@triton.jit
def _quotients(a, b, out, FAR_FROM_ZERO: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, arithmetic.quotient(tl.load(a + at), tl.load(b + at), FAR_FROM_ZERO))


@triton.jit
def _square_roots(x, out, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, arithmetic.square_root(tl.load(x + at)))


@triton.jit
def _roots(x, out, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, arithmetic.cube_root_floor(tl.load(x + at)))


@triton.jit
def _words(stream, words, uniform, dither4, dither5, NEAR: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr):
    j, block = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    drawn = arithmetic.random_words(stream, j, block, NEAR, BM, BLOCK)
    at = j[:, None] * (BLOCK * tl.num_programs(1)) + block * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(words + at, drawn.to(tl.int64))
    tl.store(uniform + at, arithmetic.uniform(drawn))
    tl.store(dither4 + at, arithmetic.dither(drawn, 0, 4, 13))
    tl.store(dither5 + at, arithmetic.dither(drawn, 4, 5, 13))


@triton.jit
def _opened(words, out, BITS: tl.constexpr, WORDS: tl.constexpr):
    word, k = tl.load(words + tl.arange(0, WORDS)), tl.arange(0, 32 // BITS)
    at = tl.arange(0, WORDS)[:, None] * (32 // BITS) + k[None, :]
    tl.store(out + at, arithmetic.open_word(word[:, None], k[None, :], BITS))


@triton.jit
def _integers(x, out, narrow, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    tl.store(out + at, arithmetic.to_float(arithmetic.to_int(value, 128), 128))
    tl.store(narrow + at, arithmetic.to_int8(value))


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of fp32; one NaN is like another."""
    return torch.where(x.isnan(), torch.nan, x).view(torch.int32)


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Any bits; mantissas next to a power of 2; bf16 over fp32 of usual sizes; and everything special over the same."""
    torch.manual_seed(0)

    def any_bits() -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (SIZE,)).to(torch.int32)

    edge = any_bits() & -8388593  # mantissas 0 .. 15
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-39, 2e-38, 3e38, 1.0, -1e-30, 1e20])
    square = special.repeat_interleave(len(special)), special.repeat(len(special))
    whole = [torch.cat([x, torch.ones(SIZE - len(x))]) for x in square]
    usual = torch.randn(SIZE) * torch.logspace(-9, 3, SIZE), torch.rand(SIZE) * torch.logspace(3, -9, SIZE) + 1e-8
    a = [any_bits().view(torch.float32), edge.view(torch.float32), usual[0].bfloat16().float(), whole[0]]
    b = [any_bits().view(torch.float32), any_bits().view(torch.float32), usual[1], whole[1]]
    return torch.cat(a), torch.cat(b)


@pytest.mark.parametrize("far_from_zero", [False, True])
def test_quotients_are_ieees(far_from_zero: bool):
    a, b = pairs()
    if far_from_zero:
        b = torch.where(b.abs() < 2.0**-60, 2.0**-60, b)
    out = torch.empty_like(a, device=DEVICE)
    _quotients[(len(a) // SIZE,)](a.to(DEVICE), b.to(DEVICE), out, far_from_zero, SIZE)
    assert torch.equal(bits(out.cpu()), bits(a / b))


@pytest.mark.skipif(DEVICE != "cuda", reason="the interpreter divides as torch does, and is slow")
def test_quotients_are_ieees_for_every_mantissa():
    """Of the divisor; the dividend's are those next to powers of 2, and some more."""
    b = (torch.arange(2**23, dtype=torch.int32, device=DEVICE) | 0x3F800000).view(torch.float32)
    out = torch.empty_like(b)
    for dividend in (1.0, 1 + 2.0**-23, 2 - 2.0**-23, 1.5, 1.0078125, 1.9921875, 1.2345678):
        a = torch.full_like(b, dividend)
        _quotients[(len(a) // SIZE,)](a, b, out, True, SIZE)
        assert torch.equal(out, a / b), dividend


def test_square_roots_are_ieees():
    x = torch.cat(pairs()).abs()
    if DEVICE == "cuda":  # every mantissa, at an even and at an odd exponent
        x = torch.cat([x, torch.arange(0x3F800000, 0x40800000, dtype=torch.int32).view(torch.float32)])
    out = torch.empty_like(x, device=DEVICE)
    _square_roots[(len(x) // SIZE,)](x.to(DEVICE), out, SIZE)
    assert torch.equal(bits(out.cpu()), bits(x.double().sqrt().float()))


def test_roots_are_too_small_by_one_at_most():
    cubes = torch.arange(128).double().pow(3).float()
    near = torch.cat([cubes, *(torch.nextafter(cubes, torch.tensor(to)) for to in (torch.inf, -torch.inf))])
    x = torch.cat([near[near >= 0], torch.rand(SIZE) * 127**3])[:SIZE]
    out = torch.empty_like(x, device=DEVICE)
    _roots[(1,)](x.to(DEVICE), out, SIZE)
    k = out.cpu().double()
    assert (k == k.floor()).all()
    assert (k**3 <= x.double()).all()
    assert ((k + 2) ** 3 > x.double()).all()
    _roots[(1,)](torch.full((SIZE,), torch.nan, device=DEVICE), out, SIZE)
    assert (out == 0).all()


@pytest.mark.parametrize(("near", "rows"), [(1, 4), (2, 4), (4, 8)])
def test_words_and_what_is_made_of_them_are_the_references(near: int, rows: int):
    stream = torch.tensor([2**63 - 25, 2**31 + 7], device=DEVICE)
    shape = (2 * rows, 3 * 256)
    found = [torch.empty(shape, dtype=dtype, device=DEVICE) for dtype in (torch.int64, *[torch.float32] * 3)]
    _words[(2, 3)](stream, *found, near, rows, 256)
    words = rounding.random_words(torch.arange(shape[0], device=DEVICE), shape[1], stream[1], stream[0])
    expected = words, rounding.uniform(words), rounding.spare_dither(words, 0, 4), rounding.spare_dither(words, 4, 5)
    for mine, reference in zip(found, expected, strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("code_bits", [2, 4, 8])
def test_words_are_opened(code_bits: int):
    low = 2 ** (code_bits - 1)
    codes = torch.randint(-low, low, (1, 16 * 32 // code_bits), dtype=torch.int8, device=DEVICE)
    out = torch.empty(codes.shape, device=DEVICE)
    _opened[(1,)](pack(codes, code_bits), out, code_bits, 16)
    assert torch.equal(out, codes.float())


def test_integers_come_through():
    x = torch.arange(-128, 128, device=DEVICE).float()
    out, narrow = torch.empty_like(x), torch.empty(256, dtype=torch.int8, device=DEVICE)
    _integers[(1,)](x, out, narrow, 256)
    assert torch.equal(out, x)
    assert torch.equal(narrow.float(), x)
