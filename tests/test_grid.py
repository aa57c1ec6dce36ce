import dataclasses

import pytest
import torch

from peft_lrqat import Grid
from peft_lrqat.grid import (
    SCALE_DTYPES,
    code_range,
    dequantize,
    quantize,
    rows_of,
    scales_out_of_range,
    snap_scale,
    sum_per_scale,
)


@pytest.mark.parametrize("bits", range(2, 9))
def test_bounds(bits):
    grid = Grid(bits, -1)
    assert (grid.qmin, grid.qmax) == code_range(bits) == (-(2**bits) // 2, 2**bits // 2 - 1)


@pytest.mark.parametrize("bits", [1, 9, 4.0, "4", True, None])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match="bits"):
        Grid(bits)


def test_symmetric_is_true_or_false():
    with pytest.raises(ValueError, match="`symmetric` is 'no'; allowed are True, False"):
        Grid(4, 128, "no")


@pytest.mark.parametrize("group_size", [-2, 64.0, False, None])
def test_group_size_out_of_range(group_size):
    with pytest.raises(ValueError, match="group_size"):
        Grid(4, group_size)


def test_group_size_must_divide_and_the_error_names_what_does():
    Grid(4, 64).check_divides(192)
    Grid(4, -1).check_divides(191)
    Grid(4, 0).check_divides(191)
    with pytest.raises(ValueError, match=r"does not divide the 576 .* of layer 3\..*96, 64"):
        Grid(4, 128).check_divides(576, "layer 3")
    with pytest.raises(ValueError, match="-1"):
        Grid(4, 128).check_divides(191)


def test_scale_shape():
    assert Grid(4, 16).scale_shape(5, 48) == (5, 3)
    assert Grid(4, -1).scale_shape(5, 48) == (5, 1)
    assert Grid(4, 0).scale_shape(5, 48) == (1, 1)


def test_a_grid_is_a_value():
    grid = Grid(3, 32, False)
    assert grid == Grid(3, 32, False)
    assert len({grid, Grid(3, 32, False), Grid(3, 32, True)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.bits = 4


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [5, -1, 0])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_survives_dequantize_and_quantize(bits, group_size, symmetric):
    grid = Grid(bits, group_size, symmetric)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (7, 15), dtype=torch.int8)
    scale = snap_scale(torch.rand(grid.scale_shape(7, 15)) * 0.1 + 1e-3, "auto")
    zero = None if symmetric else torch.randint(grid.qmin, grid.qmax + 1, scale.shape, dtype=torch.int8)
    weight = dequantize(codes, scale, zero, torch.float32)
    assert torch.equal(quantize(weight, scale, zero, grid), codes)


def test_ties_go_to_even_and_the_ends_hold():
    grid = Grid(3, -1)
    weight = torch.tensor([[-9.0, -3.5, -2.5, -0.5, 0.5, 1.5, 2.5, 3.5, 9.0]])
    codes = quantize(weight, torch.ones(1, 1), None, grid)
    assert codes.tolist() == [[-4, -4, -2, 0, 0, 2, 2, 3, 3]]


def test_asymmetric_by_hand():
    # levels q - z run from -1 to 2 with z = -1 on the centred grid of 2 bits
    grid, scale, zero = Grid(2, -1, False), torch.tensor([[0.5]]), torch.tensor([[-1]], dtype=torch.int8)
    weight = torch.tensor([[-5.0, -0.5, 0.0, 0.5, 1.0, 5.0]])
    codes = quantize(weight, scale, zero, grid)
    assert codes.tolist() == [[-2, -2, -1, 0, 1, 1]]
    assert dequantize(codes, scale, zero, torch.float32).tolist() == [[-0.5, -0.5, 0.0, 0.5, 1.0, 1.0]]


def _positive_floats() -> torch.Tensor:
    """Magnitudes from 1e-12 to 1e8, dense around the numbers where fp16 changes its spacing or ends."""
    edges = torch.tensor([2.0**e for e in (-24, -17, -14, 15, 16)])
    near = (edges.unsqueeze(1) * torch.linspace(0.97, 1.03, 301)).flatten()
    return torch.cat([torch.logspace(-12, 8, 4001), near, torch.tensor([0.0, 65504.0, 65520.0])])


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_snapped_scales_are_positive_and_stay(scale_dtype):
    snapped = snap_scale(_positive_floats(), scale_dtype)
    assert snapped.dtype == torch.float32
    assert (snapped > 0).all()
    assert torch.isfinite(snapped).all()
    assert torch.equal(snap_scale(snapped, scale_dtype), snapped)


@pytest.mark.parametrize(
    ("scale_dtype", "exact_in"),
    [("auto", (torch.bfloat16, torch.float16)), ("bf16", (torch.bfloat16,)), ("fp16", (torch.float16,))],
)
def test_snapped_scales_are_exact_where_they_will_be_stored(scale_dtype, exact_in):
    snapped = snap_scale(_positive_floats(), scale_dtype)
    for dtype in exact_in:
        assert torch.equal(snapped.to(dtype).float(), snapped)


def test_snapping_is_to_the_nearest_number_that_both_dtypes_hold():
    every_fp16 = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    both = every_fp16[every_fp16.bfloat16().float() == every_fp16].double()
    scale = _positive_floats()
    scale = scale[(scale > both.min()) & (scale < both.max())]
    nearest = (scale.double().unsqueeze(1) - both).abs().amin(dim=1)
    assert torch.equal((snap_scale(scale, "auto").double() - scale.double()).abs(), nearest)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_a_scale_keeps_its_sign(scale_dtype):
    scale = _positive_floats()
    scale = scale[scale > 0]
    assert torch.equal(snap_scale(-scale, scale_dtype), -snap_scale(scale, scale_dtype))
    assert (snap_scale(torch.tensor([0.0, -0.0]), scale_dtype) > 0).all()


def test_a_scale_is_lost_where_it_leaves_the_range_or_changes_its_sign():
    start = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, -(2.0**-24), -1.0])
    scale = torch.tensor([0.5, -0.5, -0.5, 0.5, 1e6, -1e6, -(2.0**-26), torch.nan])
    lost = scales_out_of_range(scale, start, "auto")
    assert lost.tolist() == [False, False, True, True, True, True, False, True]


def test_unknown_scale_dtype():
    with pytest.raises(ValueError, match="scale_dtype"):
        snap_scale(torch.ones(1), "fp8")


@pytest.mark.parametrize("scales", [(6, 3), (6, 1), (1, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("step", [1, 4, 6])
def test_what_shares_a_scale_is_added_up_whatever_the_chunks(scales, step):
    values = torch.arange(72.0).view(6, 12)
    expected = values.view(6, scales[1], -1).sum(-1)
    expected = expected.sum(0, keepdim=True) if scales[0] == 1 else expected
    assert torch.equal(sum_per_scale(values, torch.ones(scales)), expected)
    assert torch.equal(sum_per_scale(values.view(6, scales[1], -1), torch.ones(scales)), expected)
    total = torch.zeros(scales)
    for start in range(0, 6, step):
        rows = slice(start, min(start + step, 6))
        rows_of(total, rows).add_(sum_per_scale(values[rows], rows_of(torch.ones(scales), rows)))
    assert torch.equal(total, expected)


def test_rows_of_no_zero_points_are_none():
    assert rows_of(None, slice(0, 2)) is None
