"""Which type a layer goes into, and what is read back of it."""

from __future__ import annotations

import pytest
import torch

from peft_lrqat.formats.gguf.blocks import BLOCK_TYPES
from peft_lrqat.formats.gguf.choice import from_blocks, holds, rows_of, smallest, to_blocks
from peft_lrqat.grid import TERNARY, Grid, GridTensor
from tests.ggml import dequantize, filled

ROWS, COLUMNS = 4, 512


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "name"),
    [
        (TERNARY, 0, True, "tq1_0"),
        (TERNARY, 64, True, "q2_0"),
        (TERNARY, 32, True, "q4_0"),
        (2, -1, True, "tq2_0"),
        (2, 64, True, "q2_0"),
        (2, 32, True, "q4_0"),
        (2, -1, False, "q2_k"),
        (2, 64, False, "q4_0"),
        (3, -1, True, "q3_k"),
        (3, 64, False, "q4_0"),
        (4, -1, True, "q4_0"),
        (4, 32, True, "q4_0"),
        (4, -1, False, "q4_k"),
        (4, 32, False, "q5_0"),
        (5, 32, True, "q5_0"),
        (5, -1, False, "q5_k"),
        (6, -1, True, "q6_k"),
        (7, 32, False, "q8_0"),
        (8, 128, True, "q8_0"),
    ],
)
def test_the_smallest_exact_type_is_chosen(bits, group_size, symmetric, name):
    tensor = filled(Grid(bits, group_size, symmetric))
    if not symmetric:  # zero points for which nothing smaller happens to do
        tensor.zero_point.fill_(-tensor.grid.qmin - 1)
        tensor.scale.fill_(255 / 128)
        tensor.scale[:, 1::2] = 253 / 128
    assert smallest([tensor])[0].name == name


def test_four_bits_with_zero_points_go_into_q4_1_where_the_offset_is_exact_in_fp16():
    tensor = filled(Grid(4, 32, symmetric=False))
    tensor.scale.copy_(tensor.scale.log2().round().exp2())
    kind, (stored,) = smallest([tensor])
    assert kind.name == "q4_1"
    assert torch.equal(dequantize(stored, "q4_1", COLUMNS), tensor.dequantize(torch.float32))


def test_experts_in_one_tensor_have_the_type_that_holds_each_of_them():
    narrow, wide = filled(Grid(4, 32, symmetric=False)), filled(Grid(4, 32, symmetric=False))
    narrow.scale.copy_(narrow.scale.log2().round().exp2())
    wide.zero_point.fill_(-wide.grid.qmin - 1)
    wide.scale.fill_(255 / 128)
    wide.scale[:, 1::2] = 253 / 128
    assert [smallest([part])[0].name for part in (narrow, wide)] == ["q4_1", "q5_0"]
    kind, stored = smallest([narrow, wide])
    assert kind.name == "q5_0"
    for part, data in zip((narrow, wide), stored, strict=True):
        assert torch.equal(dequantize(data, "q5_0", COLUMNS), part.dequantize(torch.float32))


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=lambda kind: kind.name)
def test_a_changed_integer_or_scale_is_noticed(kind):
    grid = Grid(TERNARY if kind.name == "tq1_0" else 2, -1)
    tensor = filled(grid)
    stored = to_blocks(tensor, kind)
    other = rows_of(tensor, torch.arange(ROWS))  # a copy
    other.codes[2, 77] = 0 if other.codes[2, 77] else 1
    assert not holds(to_blocks(other, kind), kind, tensor)
    other.codes.copy_(tensor.codes)
    assert holds(to_blocks(other, kind), kind, tensor)
    scaled = GridTensor(tensor.codes, tensor.scale * 2, None, grid)
    assert not holds(stored, kind, scaled)


def test_one_scale_for_a_tensor_reads_back_in_every_block():
    tensor = filled(Grid(TERNARY, 0))
    levels, scale = from_blocks(to_blocks(tensor, BLOCK_TYPES["tq2_0"]), BLOCK_TYPES["tq2_0"])
    assert torch.equal(levels, tensor.codes.to(torch.int16))
    assert torch.equal(scale, tensor.scale.expand(ROWS, COLUMNS // 256))
