import pytest
import torch

from peft_lrqat.grid import Grid, dequantize, grouped
from peft_lrqat.ops.stored_base import BaseFormat, decode_base, encode_base, from_eight_bits, to_eight_bits
from tests.problems import KINDS


@pytest.mark.parametrize(("bits", "downcast"), KINDS)
def test_stored_base(bits, downcast):
    grid, fmt = Grid(bits, -1), BaseFormat(bits, 33, downcast)
    assert (fmt.qmin, fmt.qmax) == (grid.qmin, grid.qmax)
    levels = (torch.rand(7, 33) - 0.5) * 2**bits
    stored = encode_base(levels.clone(), bits, downcast)
    assert not stored.is_floating_point()
    assert stored.nbytes <= 7 * {"fx8": 33, "int": 36 * bits / 8 + 4, "fp32": 132}.get(downcast, 66)
    found = decode_base(stored, fmt)
    half_step = {"fx8": 2.0 ** (bits - 9), "int": 0.5, "fp32": 0}.get(downcast, 2.0 ** (bits - 9))
    inside = levels.clamp(grid.qmin, grid.qmax)
    assert ((found - levels).abs() <= half_step + (levels - inside).abs()).all()
    found.zero_()  # a copy: whoever decodes may write into it
    assert torch.equal(stored, encode_base(levels.clone(), bits, downcast))


@pytest.mark.parametrize("grid", [Grid(4, -1), Grid(2, 11, False), Grid(7, 0, False)], ids=Grid.describe)
def test_fixed_point_is_an_8_bit_weight_with_its_fraction(grid):
    shape = grid.scale_shape(7, 33)
    zero_point = None if grid.symmetric else torch.randint(grid.qmin, grid.qmax + 1, shape, dtype=torch.int8)
    levels = (torch.rand(7, 33) - 0.5) * 2**grid.bits
    numbers, scale = encode_base(levels.clone(), grid.bits, "fx8"), torch.rand(shape) + 0.1
    wide = to_eight_bits(numbers, scale, zero_point, grid)
    assert wide.grid == Grid(8, grid.group_size, grid.symmetric)
    found = from_eight_bits(wide, grid.bits)
    for one, other in zip(found, (numbers, scale, zero_point), strict=True):
        assert one is other is None or torch.equal(one, other)
    middle = dequantize(decode_base(numbers, BaseFormat(grid.bits, 33, "fx8")), scale, zero_point, torch.float32)
    step = grouped(torch.ones(7, 33), scale) * wide.scale.unsqueeze(-1)
    assert torch.allclose(wide.dequantize(torch.float32) + step.view(7, 33) / 2, middle, atol=1e-5)
