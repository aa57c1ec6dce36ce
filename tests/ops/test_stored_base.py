import pytest
import torch

from peft_lrqat.grid import Grid
from peft_lrqat.ops.stored_base import BaseFormat, decode_base, encode_base
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
