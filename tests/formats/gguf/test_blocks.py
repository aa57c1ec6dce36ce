"""Each of ggml's types, read by ggml's own C code."""

import itertools

import pytest
import torch

from peft_lrqat.formats.gguf.blocks import BLOCK_TYPES
from peft_lrqat.formats.gguf.choice import candidates, fit, holds, smallest, to_blocks
from peft_lrqat.formats.gguf.contents import NotExact
from peft_lrqat.grid import TERNARY, Grid
from tests.ggml import dequantize, filled

ROWS, COLUMNS = 4, 512
GRIDS = [
    Grid(bits, group_size, symmetric)
    for bits, group_size, symmetric in itertools.product(
        (TERNARY, 2, 3, 4, 5, 6, 7, 8), (0, -1, 32, 64, 256), (True, False)
    )
    if symmetric or bits != TERNARY
]


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
        smallest([tensor])


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=lambda kind: kind.name)
def test_levels_outside_of_a_type_are_refused(kind):
    grid = Grid(8, -1)
    assert fit(kind, grid, COLUMNS).problem or kind.name == "q8_0"
    wide = filled(Grid(8, -1, symmetric=False))
    with pytest.raises(NotExact):
        to_blocks(wide, kind)
