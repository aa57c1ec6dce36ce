"""Arithmetic of the optimizer step in few instructions: random words, quotients, estimates of roots.

The step is bound by instructions, not by bytes. What stands here has the same results as the plain form, which Triton's
interpreter computes; where they differ in more than the order of bits, a test compares the two on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import INTERPRETED

#: Exponent bits of 1.0 and of 2^23: a mantissa m behind them makes 1 + m 2^-23 and 2^23 + m, without a conversion.
ONE = tl.constexpr(0x3F800000)
LARGE = tl.constexpr(0x4B000000)


@triton.jit
def _times(x, factor: tl.constexpr):
    """Multiply uint32 by a constant: the upper and the lower half of the product, by one instruction."""
    product = x.to(tl.uint64) * factor
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def random_words(stream, j, block, NEAR: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr):
    """Draw `rounding.random_words` of BM rows and one block of columns: uint32 (BM, BLOCK).

    Where rows, columns and the step meet for the first time decides what a thread computes once for many elements.
    """
    key = tl.load(stream)
    k0, k1 = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    step = (tl.load(stream + 1) & 0xFFFFFFFF).to(tl.uint32)
    # the numbers of a thread's columns first: so they are drawn by the thread that needs them
    zero = tl.zeros((NEAR, BM, BLOCK // 4 // NEAR), dtype=tl.uint32)
    number = (block * (BLOCK // 4) + NEAR * tl.arange(0, BLOCK // 4 // NEAR))[None, None, :]
    number += tl.arange(0, NEAR)[:, None, None]
    c0, c1 = zero + number.to(tl.uint32), zero + j.to(tl.uint32)[None, :, None]
    c2, c3 = zero + step, zero
    for _ in tl.static_range(10):
        high0, low0 = _times(c0, 0xD2511F53)
        high2, low2 = _times(c2, 0xCD9E8D57)
        c0, c2 = high2 ^ c1 ^ k0, high0 ^ c3 ^ k1
        c1, c3 = low2, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    return tl.reshape(tl.permute(words, (1, 2, 0, 3, 4)), (BM, BLOCK))


@triton.jit
def uniform(words):
    """Make fp32 in (0, 1) as `rounding.uniform`: 1 + k 2^-23, less than which is exact."""
    return ((words >> 9) | ONE).to(tl.float32, bitcast=True) - (1.0 - 1.0 / (1 << 24))


@triton.jit
def dither(words, LOW: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr):
    """Make fp32 in (0, 1) as `rounding.spare_dither`, whose bits go to the top of a mantissa."""
    spare = (words << (23 - LOW - WIDTH)) & (((1 << WIDTH) - 1) << (23 - WIDTH))
    shared = (words >> (WIDTH + SHARED - 14)) & (((1 << SHARED) - 1) << (23 - WIDTH - SHARED))
    return (spare | shared | ONE).to(tl.float32, bitcast=True) - (1.0 - 1.0 / (1 << (WIDTH + SHARED + 1)))


@triton.jit
def to_float(n, OFFSET: tl.constexpr):
    """Make fp32 n - OFFSET of int32 n in [0, 2^23)."""
    return (n | LARGE).to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)


@triton.jit
def open_word(word, k, BITS: tl.constexpr):
    """Make fp32, centred, of code `k` of an int32 word; `BITS` divide 32.

    A code stays where it is, behind an exponent that makes its lowest bit count 1; those of the upper half, which would
    reach into the exponent, come down by 16 bits.
    """
    upper = k * BITS >= 16
    bit = tl.where(upper, k * BITS - 16, k * BITS)
    code = tl.where(upper, (word >> 16) & 0xFFFF, word) & (((1 << BITS) - 1) << bit)
    exponent = (127 + 23 - bit) << 23
    return (code | exponent).to(tl.float32, bitcast=True) - (exponent.to(tl.float32, bitcast=True) + (1 << (BITS - 1)))


@triton.jit
def to_int(x, OFFSET: tl.constexpr):
    """Make int32 x + OFFSET, in [0, 2^22), of an integer in fp32."""
    return (x + (8388608.0 + OFFSET)).to(tl.int32, bitcast=True) - LARGE


def _eight(fast: str, check: str, slow: str, operands: int) -> tuple[tl.constexpr, tl.constexpr]:
    """Write PTX of eight results with one jump: a fast way that holds for nearly all, and a slow one for the others.

    Args:
        fast: makes {y} of {a} (and {b}); r, t and n are free.
        check: leaves {ok} only where {y} is right.
        slow: makes {y} right.
        operands: 1 or 2.

    Returns:
        The assembly and its constraints.
    """

    def each(text: str) -> str:
        return "".join(text.format(y=f"${i}", a=f"${8 + i}", b=f"${16 + i}", ok="all") for i in range(8))

    def alone(text: str) -> str:
        return text.replace("{ok}", "one")

    true = "setp.eq.u32 {ok}, 0, 0; "
    body = each(fast + check) + "@all bra DONE; " + each(alone(true + check) + "@!one " + slow) + "DONE: "
    assembly = "{ .reg .pred all, one; .reg .f32 r, t, n; " + true.format(ok="all") + body + "}"
    return tl.constexpr(assembly), tl.constexpr(",".join(["=&f"] * 8 + ["f"] * (8 * operands)))


def _at_least(what: str, bound: str) -> str:
    return f"abs.f32 t, {what}; setp.ge.and.f32 {{ok}}, t, {bound}, {{ok}}; "


# The steps of div.rn.f32 and sqrt.rn.f32 where neither they nor the operands leave the range of normal numbers. That
# the result is large enough says so, NaN is not. Quotients of divisors below 2^-60 need a look at the dividend as well:
# 2^-40, 2^-100 and 2^-50 are the bounds.
_DIVIDE = (
    "neg.f32 n, {b}; rcp.approx.ftz.f32 r, {b}; fma.rn.f32 t, n, r, 0f3F800000; fma.rn.f32 r, r, t, r; "
    "mul.rn.f32 {y}, {a}, r; fma.rn.f32 t, n, {y}, {a}; fma.rn.f32 {y}, r, t, {y}; "
)
_ROOT = (
    "rsqrt.approx.ftz.f32 r, {a}; mul.rn.ftz.f32 {y}, {a}, r; mul.rn.ftz.f32 r, r, 0f3F000000; neg.f32 n, {y}; "
    "fma.rn.f32 t, n, {y}, {a}; fma.rn.f32 {y}, t, r, {y}; "
)
_LARGE_QUOTIENT, _DIVISION = _at_least("{y}", "0f2B800000"), "div.rn.f32 {y}, {a}, {b}; "
_QUOTIENTS, _OF_TWO = _eight(_DIVIDE, _LARGE_QUOTIENT, _DIVISION, 2)
_QUOTIENTS_OF_ANY, _ = _eight(_DIVIDE, _LARGE_QUOTIENT + _at_least("{a}", "0f0D800000"), _DIVISION, 2)
_ROOTS, _OF_ONE = _eight(_ROOT, "setp.ge.and.f32 {ok}, {y}, 0f26800000, {ok}; ", "sqrt.rn.f32 {y}, {a}; ", 1)


@triton.jit
def quotient(a, b, FAR_FROM_ZERO: tl.constexpr):
    """Divide fp32 by fp32 of the same shape, rounded as IEEE 754 says; fast where |a / b| is at least 2^-40.

    FAR_FROM_ZERO: whether every |b| is 2^-60 at least, or NaN.
    """
    if INTERPRETED:
        return tl.div_rn(a, b)
    elif FAR_FROM_ZERO:
        return tl.inline_asm_elementwise(_QUOTIENTS, _OF_TWO, [a, b], dtype=tl.float32, is_pure=True, pack=8)
    else:
        return tl.inline_asm_elementwise(_QUOTIENTS_OF_ANY, _OF_TWO, [a, b], dtype=tl.float32, is_pure=True, pack=8)


@triton.jit
def square_root(x):
    """Take the root of fp32, rounded as IEEE 754 says; fast where it is at least 2^-50."""
    if INTERPRETED:
        return tl.sqrt_rn(x)
    else:
        return tl.inline_asm_elementwise(_ROOTS, _OF_ONE, [x], dtype=tl.float32, is_pure=True, pack=8)


@triton.jit
def cube_root_floor(x):
    """Find floor(cbrt(x)) or the integer below it, fp32, for 0 <= x < 2^22. NaN gives 0."""
    if INTERPRETED:
        log = tl.log2(tl.where(x == x, x, 0.0))
    else:
        log = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [tl.maximum(x, 0.0)], dtype=tl.float32, is_pure=True, pack=1
        )
    # both approximations together are off by 2e-6 at most; what is subtracted keeps the root from being too large
    return tl.floor(tl.exp2(tl.fma(log, 1.0 / 3, -1.0 / (1 << 17))))


@triton.jit
def to_int8(x):
    """Make int8 of an integer in fp32: 1.5 2^23 + x ends in its eight bits, also where it is negative."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
