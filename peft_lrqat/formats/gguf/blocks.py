"""ggml's block types: integers and scales to bytes, and back, without a float weight in between.

A GGUF tensor is rows of blocks. A block holds the *levels* L = q - z (integers) of 32, 64 or 256 consecutive weights of
a row, and what makes weights of them:

    plain     w = d L                   Q4_0, Q5_0, Q8_0, Q2_0, TQ1_0, TQ2_0      d: fp16, one a block
    offset    w = d u + m               Q4_1, Q5_1                                d, m: fp16;  u = L - low
    super     w = d c_j L               Q3_K, Q6_K                                c_j: an integer for each 16 weights
              w = d c_j u - e m_j       Q2_K, Q4_K, Q5_K                          c_j, m_j: for each 16 or 32; e: fp16

ggml evaluates these in float32, where all of them are exact as long as the stored numbers are: a level has at most 8
bits, fp16 has 11, c_j at most 7. So a block is exact or cannot be written: `pack` raises `NotExact` then; it never
rounds.

Shapes here: n blocks of `size` weights, each with `parts` = size / `part` runs of weights that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .contents import Contents, half, multiples, only, put, read_half, take, unsigned, within


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types.

    Attributes:
        number: ggml's id.
        size: weights in a block.
        part: weights that share a scale.
        lowest, highest: the levels; for types with an offset, of u.
        offset: whether a block stores where its levels begin.
        mirrored: whether a negative d may turn the range around.
    """

    name: str
    number: int
    size: int
    part: int
    bytes: int
    lowest: int
    highest: int
    pack: Callable[[Contents], torch.Tensor]
    unpack: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    offset: bool = False
    mirrored: bool = False

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.size


# -- plain types


def _pack_q4_0(block: Contents) -> torch.Tensor:
    codes = within(block.levels, -8, 7) + 8
    return torch.cat([half(only(block.scale)), put(codes, (1, 2, 16), 4)], 1)


def _unpack_q4_0(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return take(packed[:, 2:], (1, 2, 16), 4) - 8, read_half(packed[:, :2])


def _pack_q5_0(block: Contents) -> torch.Tensor:
    codes = within(block.levels, -16, 15) + 16
    return torch.cat([half(only(block.scale)), put(codes >> 4, (4, 8, 1), 1), put(codes & 15, (1, 2, 16), 4)], 1)


def _unpack_q5_0(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = take(packed[:, 6:], (1, 2, 16), 4) | take(packed[:, 2:6], (4, 8, 1), 1) << 4
    return codes - 16, read_half(packed[:, :2])


def _pack_q8_0(block: Contents) -> torch.Tensor:
    codes = within(block.levels, -128, 127).to(torch.int8)
    return torch.cat([half(only(block.scale)), codes.view(torch.uint8)], 1)


def _unpack_q8_0(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return packed[:, 2:].contiguous().view(torch.int8).to(torch.int16), read_half(packed[:, :2])


def _mirror(block: Contents) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0 to 3 for w = d (code - 1), and d: negative in blocks that use level -2."""
    turned = (block.levels < -1).any(1, keepdim=True)
    levels = within(torch.where(turned, -block.levels, block.levels), -1, 2)
    scale = only(block.scale)
    return levels + 1, torch.where(turned, -scale, scale)


def _turned_back(codes: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    levels = codes - 1
    return torch.where(d < 0, -levels, levels), d.abs()


def _pack_q2_0(block: Contents) -> torch.Tensor:
    codes, d = _mirror(block)
    return torch.cat([half(d), put(codes, (16, 4, 1), 2)], 1)


def _unpack_q2_0(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _turned_back(take(packed[:, 2:], (16, 4, 1), 2), read_half(packed[:, :2]))


def _pack_tq2_0(block: Contents) -> torch.Tensor:
    codes, d = _mirror(block)
    return torch.cat([put(codes, (2, 4, 32), 2), half(d)], 1)


def _unpack_tq2_0(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _turned_back(take(packed[:, :64], (2, 4, 32), 2), read_half(packed[:, 64:]))


# TQ1_0: five ternary digits a byte (four in the last four bytes), most significant digit first. The byte is not the
# number t in 0..242 itself but ceil(t * 256 / 243): multiplied by 3, modulo 256, it gives one digit after the other.
_TERNARY_RUNS: tuple[tuple[int, int], ...] = ((5, 32), (5, 16), (4, 4))  # digits a byte, bytes


def _pack_tq1_0(block: Contents) -> torch.Tensor:
    digits = (within(block.levels, -1, 1) + 1).to(torch.int32)
    runs, at = [], 0
    for count, inner in _TERNARY_RUNS:
        run = digits[:, at : at + count * inner].view(-1, count, inner)
        number = torch.zeros_like(run[:, 0])
        for i in range(count):
            number += run[:, i] * 3 ** (4 - i)
        runs.append(((number * 256 + 242) // 243).to(torch.uint8))
        at += count * inner
    return torch.cat([*runs, half(only(block.scale))], 1)


def _unpack_tq1_0(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    digits, at = [], 0
    for count, inner in _TERNARY_RUNS:
        byte = packed[:, at : at + inner].to(torch.int32)
        digits += [((byte * 3**i & 255) * 3) >> 8 for i in range(count)]
        at += inner
    return torch.cat(digits, 1).to(torch.int16) - 1, read_half(packed[:, at:])


# -- types with an offset


def _pack_q4_1(block: Contents) -> torch.Tensor:
    scale, codes = only(block.scale), unsigned(block, 32, 15)
    return torch.cat([half(scale), half(block.low[:, :1] * scale), put(codes, (1, 2, 16), 4)], 1)


def _pack_q5_1(block: Contents) -> torch.Tensor:
    scale, codes = only(block.scale), unsigned(block, 32, 31)
    bits = [put(codes >> 4, (4, 8, 1), 1), put(codes & 15, (1, 2, 16), 4)]
    return torch.cat([half(scale), half(block.low[:, :1] * scale), *bits], 1)


def _from_offset(codes: torch.Tensor, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    d, m = read_half(packed[:, :2]), read_half(packed[:, 2:4])
    return codes + (m / d).round().to(torch.int16), d


def _unpack_q4_1(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _from_offset(take(packed[:, 4:], (1, 2, 16), 4), packed)


def _unpack_q5_1(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = take(packed[:, 8:], (1, 2, 16), 4) | take(packed[:, 4:8], (4, 8, 1), 1) << 4
    return _from_offset(codes, packed)


# -- super-blocks of 256 weights


def _with_minima(block: Contents, largest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """d, e (n, 1) and c, m (n, parts) of w = d c u - e m, where e m = -low d c."""
    d, factors = multiples(block.scale, largest)
    minima = within(-block.low.to(torch.int64) // block.unit * factors, 0, largest, "offsets")
    return d, d * block.unit, factors, minima


def _from_minima(
    codes: torch.Tensor, d: torch.Tensor, e: torch.Tensor, factors: torch.Tensor, minima: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = d * factors
    low = (e * minima / scale).round().to(torch.int16)
    return codes - low.repeat_interleave(codes.shape[1] // low.shape[1], 1), scale


def _pack_q2_k(block: Contents) -> torch.Tensor:
    d, e, factors, minima = _with_minima(block, 15)
    codes = put(unsigned(block, 16, 3), (2, 4, 32), 2)
    return torch.cat([(factors | minima << 4).to(torch.uint8), codes, half(d), half(e)], 1)


def _unpack_q2_k(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, d, e = take(packed[:, 16:80], (2, 4, 32), 2), read_half(packed[:, 80:82]), read_half(packed[:, 82:])
    return _from_minima(codes, d, e, packed[:, :16] & 15, packed[:, :16] >> 4)


def _pack_q3_k(block: Contents) -> torch.Tensor:
    d, factors = multiples(block.scale, 31, signed=True)
    codes, stored = within(block.levels, -4, 3) + 4, factors + 32
    high, low = put(codes >> 2, (1, 8, 32), 1), put(codes & 3, (2, 4, 32), 2)
    return torch.cat([high, low, put(stored & 15, (1, 2, 8), 4), put(stored >> 4, (1, 4, 4), 2), half(d)], 1)


def _unpack_q3_k(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = take(packed[:, 32:96], (2, 4, 32), 2) | take(packed[:, :32], (1, 8, 32), 1) << 2
    stored = take(packed[:, 96:104], (1, 2, 8), 4) | take(packed[:, 104:108], (1, 4, 4), 2) << 4
    return codes - 4, read_half(packed[:, 108:]) * (stored - 32)


def _put_six_bits(factors: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """Two times eight 6-bit numbers in 12 bytes: the first four of each, with the others' upper two bits on top."""
    first = factors[:, :4] | factors[:, 4:] >> 4 << 6
    second = minima[:, :4] | minima[:, 4:] >> 4 << 6
    return torch.cat([first, second, factors[:, 4:] & 15 | (minima[:, 4:] & 15) << 4], 1).to(torch.uint8)


def _take_six_bits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, second, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    factors = torch.cat([first & 63, low & 15 | first >> 6 << 4], 1)
    return factors, torch.cat([second & 63, low >> 4 | second >> 6 << 4], 1)


def _pack_q4_k(block: Contents) -> torch.Tensor:
    d, e, factors, minima = _with_minima(block, 63)
    codes = put(unsigned(block, 32, 15), (4, 2, 32), 4)
    return torch.cat([half(d), half(e), _put_six_bits(factors, minima), codes], 1)


def _unpack_q4_k(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = take(packed[:, 16:], (4, 2, 32), 4)
    return _from_minima(codes, read_half(packed[:, :2]), read_half(packed[:, 2:4]), *_take_six_bits(packed[:, 4:16]))


def _pack_q5_k(block: Contents) -> torch.Tensor:
    d, e, factors, minima = _with_minima(block, 63)
    codes = unsigned(block, 32, 31)
    bits = [put(codes >> 4, (1, 8, 32), 1), put(codes & 15, (4, 2, 32), 4)]
    return torch.cat([half(d), half(e), _put_six_bits(factors, minima), *bits], 1)


def _unpack_q5_k(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = take(packed[:, 48:], (4, 2, 32), 4) | take(packed[:, 16:48], (1, 8, 32), 1) << 4
    return _from_minima(codes, read_half(packed[:, :2]), read_half(packed[:, 2:4]), *_take_six_bits(packed[:, 4:16]))


def _pack_q6_k(block: Contents) -> torch.Tensor:
    d, factors = multiples(block.scale, 127, signed=True)
    codes = within(block.levels, -32, 31) + 32
    bits = [put(codes & 15, (2, 2, 64), 4), put(codes >> 4, (2, 4, 32), 2)]
    return torch.cat([*bits, factors.to(torch.uint8), half(d)], 1)


def _unpack_q6_k(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = take(packed[:, :128], (2, 2, 64), 4) | take(packed[:, 128:192], (2, 4, 32), 2) << 4
    return codes - 32, read_half(packed[:, 208:]) * packed[:, 192:208].contiguous().view(torch.int8)


#: Smallest first, and of two alike the older one, which more engines have fast kernels for.
BLOCK_TYPES: dict[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("tq1_0", 34, 256, 256, 54, -1, 1, _pack_tq1_0, _unpack_tq1_0),
        BlockType("tq2_0", 35, 256, 256, 66, -1, 2, _pack_tq2_0, _unpack_tq2_0, mirrored=True),
        BlockType("q2_0", 42, 64, 64, 18, -1, 2, _pack_q2_0, _unpack_q2_0, mirrored=True),
        BlockType("q2_k", 10, 256, 16, 84, 0, 3, _pack_q2_k, _unpack_q2_k, offset=True),
        BlockType("q3_k", 11, 256, 16, 110, -4, 3, _pack_q3_k, _unpack_q3_k),
        BlockType("q4_0", 2, 32, 32, 18, -8, 7, _pack_q4_0, _unpack_q4_0),
        BlockType("q4_k", 12, 256, 32, 144, 0, 15, _pack_q4_k, _unpack_q4_k, offset=True),
        BlockType("q4_1", 3, 32, 32, 20, 0, 15, _pack_q4_1, _unpack_q4_1, offset=True),
        BlockType("q5_0", 6, 32, 32, 22, -16, 15, _pack_q5_0, _unpack_q5_0),
        BlockType("q5_k", 13, 256, 32, 176, 0, 31, _pack_q5_k, _unpack_q5_k, offset=True),
        BlockType("q5_1", 7, 32, 32, 24, 0, 31, _pack_q5_1, _unpack_q5_1, offset=True),
        BlockType("q6_k", 14, 256, 16, 210, -32, 31, _pack_q6_k, _unpack_q6_k),
        BlockType("q8_0", 8, 32, 32, 34, -128, 127, _pack_q8_0, _unpack_q8_0),
    )
}
