"""What is checked of a layer's small tensors and codes, whatever format they came from."""

from __future__ import annotations

import pytest
import torch

from peft_lrqat.formats.scheme import Scheme, check_codes, check_order, check_scales, narrow
from peft_lrqat.grid import Grid
from peft_lrqat.ops.activations import Activations

SCHEME = Scheme("gptq", 4, 16, True)


def scales(scheme: Scheme = SCHEME, groups: int = 2, zero: torch.Tensor | None = None):
    return check_scales(scheme, torch.full((8, groups), 0.5), zero, 8, 16 * groups, "x")


def test_zero_points_have_the_last_word_about_symmetry():
    assert scales(zero=torch.zeros(8, 2, dtype=torch.int8)).grid == Grid(4, 16)
    assert scales(zero=torch.zeros(8, 2, dtype=torch.int8)).zero_point is None
    zero = torch.zeros(8, 2, dtype=torch.int8)
    zero[3, 1] = -2
    assert scales(zero=zero).grid == Grid(4, 16, False)
    asymmetric = scales(Scheme("awq", 4, 16, False), zero=torch.zeros(8, 2, dtype=torch.int8))
    assert asymmetric.grid == Grid(4, 16, False)


def test_one_scale_is_a_channel_unless_it_is_a_whole_group():
    assert scales(groups=1).grid == Grid(4, 16)  # as in the other layers of a checkpoint in groups of 16
    assert scales(Scheme("gptq", 4, 64, True), groups=1).grid == Grid(4, -1)


def test_a_wider_file_is_read_on_the_recorded_grid():
    narrowed = narrow(scales(), Grid(3, -1), 8, 32, "x")
    assert (narrowed.grid, narrowed.scale.shape) == (Grid(3, -1), (8, 1))
    narrowed = narrow(scales(), Grid(1.58, 0), 8, 32, "x")
    assert narrowed.scale.shape == (1, 1)
    assert narrow(scales(), Grid(4, 16, False), 8, 32, "x").zero_point.shape == (8, 2)


@pytest.mark.parametrize("recorded", [Grid(5, 16), Grid(4, 8), Grid(4, 12)])
def test_a_record_that_does_not_fit(recorded: Grid):
    with pytest.raises(ValueError, match=r"config\.json records the grid .* Delete the entry"):
        narrow(scales(), recorded, 8, 32, "x")


def test_codes_must_lie_on_the_grid():
    with pytest.raises(ValueError, match="codes from -8 to 7, outside of the grid"):
        check_codes(narrow(scales(), Grid(3, 16), 8, 32, "x"), torch.tensor([[-8, 7] * 16] * 8, dtype=torch.int8), "x")


def test_an_order_of_the_inputs():
    check_order(torch.arange(32) // 16, 32, 16, "x", "g_idx")
    check_order(torch.full((32,), -1), 32, 16, "x", "g_idx")
    with pytest.raises(ValueError, match=r"activation order \(`g_idx`"):
        check_order(torch.arange(32) % 2, 32, 16, "x", "g_idx")
    for index in (torch.arange(16), torch.arange(32.0), torch.zeros(2, 16, dtype=torch.int64)):
        with pytest.raises(ValueError, match="an integer for each of 32 inputs is needed"):
            check_order(index, 32, 16, "x", "g_idx")


@pytest.mark.parametrize(
    ("zero", "match"),
    [
        (torch.full((8, 2), torch.nan), "zero points of dtype torch.float32"),
        (torch.full((8, 2), 8, dtype=torch.int32), r"zero points from 8 to 8, outside of the grid .* -8 to 7"),
        (torch.full((8, 2), 300, dtype=torch.int32), "outside of the grid"),
        (torch.zeros(2, 8, dtype=torch.int8), "zero points of shape"),
    ],
)
def test_zero_points_that_no_grid_has(zero: torch.Tensor, match: str):
    with pytest.raises(ValueError, match=match):
        scales(Scheme("awq", 4, 16, False), zero=zero)


def test_a_record_narrower_than_the_zero_points():
    zero = torch.full((8, 2), 5, dtype=torch.int8)
    with pytest.raises(ValueError, match="zero points from 5 to 5, outside of the grid"):
        narrow(scales(Scheme("awq", 4, 16, False), zero=zero), Grid(3, 16, False), 8, 32, "x")


def test_rounded_activations_have_no_zero_points():
    scheme = Scheme("compressed-tensors", 8, -1, True, activations=Activations("compressed-tensors"))
    with pytest.raises(ValueError, match="zero points beside rounded activations"):
        scales(scheme, 1, torch.ones(8, 1).char())
