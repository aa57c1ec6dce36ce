"""Each of ggml's types, read by ggml's own C code."""

import itertools

import pytest
import torch

from peft_lrqat.formats.gguf.blocks import BLOCK_TYPES
from peft_lrqat.formats.gguf.choice import candidates, fit, from_blocks, holds, rows_of, smallest, to_blocks
from peft_lrqat.formats.gguf.contents import NotExact
from peft_lrqat.grid import TERNARY, Grid, GridTensor

from ...ggml import dequantize

ROWS, COLUMNS = 4, 512
GRIDS = [
    Grid(bits, group_size, symmetric)
    for bits, group_size, symmetric in itertools.product(
        (TERNARY, 2, 3, 4, 5, 6, 7, 8), (0, -1, 32, 64, 256), (True, False)
    )
    if symmetric or bits != TERNARY
]


def filled(grid: Grid, rows: int = ROWS, columns: int = COLUMNS) -> GridTensor:
    """Random codes with both ends of the grid in every row, random scales and zero points."""
    codes = torch.randint(grid.qmin, grid.qmax + 1, (rows, columns)).to(torch.int8)
    codes[:, 0], codes[:, -1] = grid.qmin, grid.qmax
    shape = grid.scale_shape(rows, columns)
    scale = (torch.rand(shape) * 0.1 + 0.01).bfloat16().float()
    zero_point = None if grid.symmetric else torch.randint(grid.qmin, grid.qmax + 1, shape).to(torch.int8)
    return GridTensor(codes, scale, zero_point, grid)


@pytest.mark.parametrize("grid", GRIDS, ids=Grid.describe)
def test_every_type_that_takes_a_grid_gives_ggml_its_exact_weights(grid):
    tensor = filled(grid)
    for kind in candidates(grid, COLUMNS):
        try:
            stored = to_blocks(tensor, kind)
        except NotExact:
            assert not fit(kind, grid, COLUMNS).certain, kind.name
            continue
        assert torch.equal(dequantize(stored, kind.name, COLUMNS), tensor.dequantize(torch.float32)), kind.name
        assert holds(stored, kind, tensor), kind.name


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
    assert smallest(tensor)[0].name == name


def test_four_bits_with_zero_points_go_into_q4_1_where_the_offset_is_exact_in_fp16():
    tensor = filled(Grid(4, 32, symmetric=False))
    tensor.scale.copy_(tensor.scale.log2().round().exp2())
    kind, stored = smallest(tensor)
    assert kind.name == "q4_1"
    assert torch.equal(dequantize(stored, "q4_1", COLUMNS), tensor.dequantize(torch.float32))


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_super_blocks_take_groups_whose_scales_are_multiples_of_one_number(name):
    bits = {"q2_k": 2, "q3_k": 3, "q4_k": 4, "q5_k": 5, "q6_k": 6}[name]
    tensor = filled(Grid(bits, 32))
    factors = torch.randint(1, 16, tensor.scale.shape)
    tensor.scale.copy_(factors * 0.0123291015625)
    kind = BLOCK_TYPES[name]
    stored = to_blocks(tensor, kind)
    assert torch.equal(dequantize(stored, name, COLUMNS), tensor.dequantize(torch.float32))
    assert holds(stored, kind, tensor)
    tensor.scale[0, 0] *= 1.0078125
    with pytest.raises(NotExact, match="not multiples"):
        to_blocks(tensor, kind)


@pytest.mark.parametrize("scale", [2.0**-24, 3 * 2.0**-24, 65280.0 / 8])
def test_the_smallest_and_largest_scales_of_training_are_exact(scale):
    tensor = filled(Grid(4, -1))
    tensor.scale.fill_(scale)
    for kind in candidates(tensor.grid, COLUMNS):
        stored = to_blocks(tensor, kind)
        assert torch.equal(dequantize(stored, kind.name, COLUMNS), tensor.dequantize(torch.float32)), kind.name


def test_a_scale_that_fp16_cannot_hold_is_refused():
    tensor = filled(Grid(4, 32))
    tensor.scale[1, 3] = 0.1
    with pytest.raises(NotExact, match="fp16"):
        smallest(tensor)


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=lambda kind: kind.name)
def test_levels_outside_of_a_type_are_refused(kind):
    grid = Grid(8, -1)
    assert fit(kind, grid, COLUMNS).problem or kind.name == "q8_0"
    wide = filled(Grid(8, -1, symmetric=False))
    with pytest.raises(NotExact):
        to_blocks(wide, kind)


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
