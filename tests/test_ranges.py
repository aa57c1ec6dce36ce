import pytest
import torch

from peft_lrqat import chunks, ranges
from peft_lrqat.grid import SCALE_DTYPES, Grid, dequantize, quantize, snap_scale
from peft_lrqat.ranges import choose_range

ROWS, COLS = 6, 24
GROUPS = (8, -1, 0)


def as_lines(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """fp64 (scales, n): the weights that share a scale, one line for each scale."""
    rows, groups = grid.scale_shape(*weight.shape)
    return weight.double().reshape(rows * groups, -1)


def every_candidate(lines: torch.Tensor, grid: Grid, scale_dtype: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(scale, centred zero point) of each line for every candidate, as the module's docstring describes them."""
    lo, hi = lines.amin(dim=1).clamp(max=0).float(), lines.amax(dim=1).clamp(min=0).float()
    steps = 2**grid.bits - 1
    top, levels = (2 ** (grid.bits - 1) - 1, 2 ** (grid.bits - 1)) if grid.symmetric else (steps, steps)
    found = []
    for divisor in [top * 100 / percent for percent in range(100, 0, -1)] + list(range(1, levels + 1)):
        if grid.symmetric:
            scale = snap_scale(torch.maximum(hi, -lo) / divisor, scale_dtype)
            zero = torch.zeros_like(scale)
        else:
            scale = snap_scale((hi - lo) / divisor, scale_dtype)
            zero = (-lo * min(1.0, top / divisor) / scale).round() + grid.qmin
            zero = zero.clamp(grid.qmin, grid.qmax)
        found.append((scale, zero))
    return found


def errors(lines: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid, p: float) -> torch.Tensor:
    """sum |w - W^|^p of each line in fp64."""
    s, z = scale.double().unsqueeze(1), zero.double().unsqueeze(1)
    # codes are rounded from the fp32 quotient, as everywhere
    levels = (lines.float() / scale.unsqueeze(1)).round().double()
    return ((lines - s * ((levels + z).clamp(grid.qmin, grid.qmax) - z)).abs() ** p).sum(dim=1)


def check_against_brute_force(weight: torch.Tensor, grid: Grid, p: float) -> float:
    """Returns the share of the lines whose best scale has no rival."""
    lines = as_lines(weight, grid)
    candidates = every_candidate(lines, grid, "auto")
    table = torch.stack([errors(lines, scale, zero, grid, p) for scale, zero in candidates])
    least, best = table.min(dim=0)
    scales, zeros = (torch.stack(part) for part in zip(*candidates, strict=True))
    best_scale, best_zero = (part.gather(0, best.unsqueeze(0)).squeeze(0) for part in (scales, zeros))

    scale, zero = choose_range(weight, grid, "lp", p)
    assert scale.shape == grid.scale_shape(*weight.shape)
    flat_zero = torch.zeros_like(best_zero) if zero is None else zero.flatten().float()
    reached = errors(lines, scale.flatten(), flat_zero, grid, p)
    assert (reached <= least * (1 + 1e-5)).all()  # the search adds up in fp32 before it does in fp64
    # where no other scale comes near the best, it is the one
    other = (scales != best_scale) | (zeros != best_zero)
    clear = ~(other & (table <= least * (1 + 1e-5))).any(dim=0)
    assert torch.equal(scale.flatten()[clear], best_scale[clear])
    assert torch.equal(flat_zero[clear], best_zero[clear])
    return clear.float().mean().item()


KINDS = {
    "normal": lambda w: w * 0.02,
    "outliers": lambda w: w * 0.02 * (1 + 20 * (torch.rand(w.shape) > 0.9)),
    "positive": lambda w: w.abs() * 0.02,
    "negative": lambda w: w.abs() * -3.0,
    "shifted": lambda w: w * 0.01 + 0.05,
    "sparse": lambda w: w * (torch.rand(w.shape) > 0.8),
    "spike": lambda w: torch.eye(*w.shape) + w * 1e-3,
    "tiny": lambda w: w * 2.0**-20,
    "huge": lambda w: w * 2.0**15,
}


def weights(kind: str) -> torch.Tensor:
    return KINDS[kind](torch.randn(ROWS, COLS))


def all_weights() -> torch.Tensor:
    """(kinds * ROWS, COLS), every kind below the other."""
    return torch.cat([weights(kind) for kind in KINDS])


@pytest.mark.parametrize("p", [2.0, 2.4, 2.5, 4.0])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [8, -1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_search_finds_what_brute_force_finds(bits, group_size, symmetric, p):
    assert check_against_brute_force(all_weights(), Grid(bits, group_size, symmetric), p) > 0.5


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_search_finds_what_brute_force_finds_per_tensor(kind, bits, symmetric):
    check_against_brute_force(weights(kind), Grid(bits, 0, symmetric), 4.0)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("method", ranges.RANGE_METHODS)
def test_chunks_change_nothing(monkeypatch, method, group_size, symmetric):
    weight, grid = torch.randn(37, 48), Grid(3, group_size, symmetric)
    whole = choose_range(weight, grid, method)
    for chunk in (48 * 5, 48 * 36):
        monkeypatch.setattr(chunks, "CPU_CHUNK", chunk)
        parts = choose_range(weight, grid, method)
        assert torch.equal(parts[0], whole[0])
        assert symmetric or torch.equal(parts[1], whole[1])


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_weights_on_a_grid_keep_it(bits, group_size, symmetric):
    grid = Grid(bits, group_size, symmetric)
    first = torch.randn(ROWS, COLS) * 0.02
    scale, zero = choose_range(first, grid)
    on_grid = dequantize(quantize(first, scale, zero, grid), scale, zero, torch.float32)
    again, zero_again = choose_range(on_grid, grid)
    assert torch.equal(
        dequantize(quantize(on_grid, again, zero_again, grid), again, zero_again, torch.float32), on_grid
    )


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_weights_on_a_few_levels_of_a_grid_keep_them(symmetric):
    """Even if the ends of the grid are not used."""
    grid = Grid(4, -1, symmetric)
    on_grid = torch.randint(-3, 3, (ROWS, COLS)) * torch.tensor([2.0**-5, 0.0107421875, 1.0, 3.0, 0.5, 2.0**-9]).view(
        -1, 1
    )
    scale, zero = choose_range(on_grid, grid)
    assert torch.equal(dequantize(quantize(on_grid, scale, zero, grid), scale, zero, torch.float32), on_grid)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_minmax_clips_nothing(bits, group_size, symmetric):
    weight, grid = weights("outliers"), Grid(bits, group_size, symmetric)
    scale, zero = choose_range(weight, grid, "minmax")
    restored = dequantize(quantize(weight, scale, zero, grid), scale, zero, torch.float32)
    s = scale.unsqueeze(-1).expand(-1, -1, COLS // scale.shape[1]).reshape(scale.shape[0], COLS)
    # half a step, and what snapping the scale may cost at the far end of the grid
    assert ((restored - weight).abs() <= s * (0.5 + 2.0**grid.bits * 2.0**-8)).all()
    if symmetric:  # no smaller scale would do
        lines = as_lines(weight, grid)
        least = torch.maximum(lines.amax(dim=1) / grid.qmax, lines.amin(dim=1) / grid.qmin)
        assert torch.equal(scale.flatten(), snap_scale(least.float(), "auto"))


@pytest.mark.parametrize("method", ranges.RANGE_METHODS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", GROUPS)
def test_rows_of_zeros_stay_zero(method, group_size, symmetric):
    weight, grid = torch.randn(ROWS, COLS), Grid(4, group_size, symmetric)
    weight[2] = 0
    weight[4, 8:16] = 0
    scale, zero = choose_range(weight, grid, method)
    assert (scale > 0).all()
    restored = dequantize(quantize(weight, scale, zero, grid), scale, zero, torch.float32)
    assert torch.equal(restored[weight == 0], weight[weight == 0])
    scale, zero = choose_range(torch.zeros(ROWS, COLS), grid, method)
    assert not dequantize(quantize(torch.zeros(ROWS, COLS), scale, zero, grid), scale, zero, torch.float32).any()


@pytest.mark.parametrize("method", ranges.RANGE_METHODS)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_scales_are_snapped_and_zero_points_on_the_grid(method, scale_dtype, symmetric):
    grid = Grid(3, 8, symmetric)
    scale, zero = choose_range(torch.randn(ROWS, COLS) + 0.3, grid, method, scale_dtype=scale_dtype)
    assert scale.dtype == torch.float32
    assert torch.equal(snap_scale(scale, scale_dtype), scale)
    if symmetric:
        assert zero is None
    else:
        assert zero.dtype == torch.int8
        assert zero.shape == scale.shape
        assert zero.min() >= grid.qmin
        assert zero.max() <= grid.qmax


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", GROUPS)
def test_low_precision_weights_are_searched_in_fp32(dtype, group_size):
    weight, grid = (torch.randn(ROWS, COLS) * 0.02).to(dtype), Grid(4, group_size, False)
    low, high = choose_range(weight, grid), choose_range(weight.float(), grid)
    assert low[0].dtype == torch.float32
    assert torch.equal(low[0], high[0])
    assert torch.equal(low[1], high[1])


@pytest.mark.parametrize("group_size", GROUPS)
def test_transposed_weights(group_size):
    weight, grid = torch.randn(COLS, ROWS).t(), Grid(4, group_size)
    assert torch.equal(choose_range(weight, grid)[0], choose_range(weight.contiguous(), grid)[0])


def test_scaling_the_weights_scales_the_scales():
    weight, grid = torch.randn(ROWS, COLS), Grid(4, -1)
    scale, _ = choose_range(weight, grid)
    for power in (2.0**-8, 2.0**10):
        assert torch.equal(choose_range(weight * power, grid)[0], scale * power)


def test_search_is_better_than_minmax_in_its_own_norm():
    weight, grid = torch.randn(ROWS, 256) * 0.02, Grid(3, -1)
    for p in (2.0, 4.0):
        lines, none = as_lines(weight, grid), torch.zeros(ROWS)
        searched = errors(lines, choose_range(weight, grid, "lp", p)[0].flatten(), none, grid, p)
        covering = errors(lines, choose_range(weight, grid, "minmax")[0].flatten(), none, grid, p)
        assert (searched <= covering).all()
        assert searched.sum() < 0.9 * covering.sum()


def test_group_size_must_divide():
    with pytest.raises(ValueError, match="does not divide"):
        choose_range(torch.randn(4, 20), Grid(4, 8))


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("method", ranges.RANGE_METHODS)
def test_a_signed_scale_is_the_better_one_of_the_weight_and_of_its_mirror_image(method, bits, group_size):
    weight, grid = all_weights(), Grid(bits, group_size)
    lines = as_lines(weight, grid)
    found = choose_range(weight, grid, method, signed=True)[0].flatten()
    sides = [choose_range(weight, grid, method)[0].flatten(), -choose_range(-weight, grid, method)[0].flatten()]
    assert ((found == sides[0]) | (found == sides[1])).all()
    zero = torch.zeros_like(found)
    cost = [side.abs().double() if method == "minmax" else errors(lines, side, zero, grid, 2.5) for side in sides]
    clear = (cost[1] - cost[0]).abs() > 1e-5 * cost[0]
    turned = cost[1] < cost[0]
    if method == "lp" and bits == 4:  # only the side of the largest weight is searched
        turned = lines.amax(dim=1) > -lines.amin(dim=1)
    assert torch.equal(found[clear], torch.where(turned, sides[1], sides[0])[clear])
    assert group_size == 0 or (found < 0).any()
    lost = torch.where(turned, cost[1], cost[0]).sum() / torch.minimum(*cost).sum()
    assert lost < 1.01


@pytest.mark.parametrize("method", ranges.RANGE_METHODS)
def test_a_lattice_of_signed_scales_keeps_its_weights_and_its_scales(method):
    """As ggml's Q4_0 has them: d, an fp16 number, is a block's extremum divided by -8."""
    grid = Grid(4, 32)
    codes = torch.randint(-8, 8, (64, 256), dtype=torch.int8)
    codes[:, ::32] = -8
    d = (torch.randn(64, 8) * 0.01).half().float()
    weight = dequantize(codes, d, None, torch.float32)
    scale, _ = choose_range(weight, grid, method, scale_dtype="fp16", signed=True)
    assert torch.equal(scale, d)
    assert torch.equal(quantize(weight, scale, None, grid), codes)
    assert not torch.equal(choose_range(weight, grid, method, scale_dtype="fp16")[0].abs(), d.abs())
