import pytest
import torch

from peft_lrqat import chunks, range_search
from peft_lrqat.grid import SCALE_DTYPES, Grid
from peft_lrqat.ranges import choose_range
from tests.full_search import choose_range_slowly

ROWS, COLS = 12, 96

KINDS = {
    "normal": lambda w: w * 0.02,
    "student": lambda w: w / torch.randn(w.shape).abs().clamp(min=0.05) * 0.02,
    "outliers": lambda w: w * 0.02 * (1 + 20 * (torch.rand(w.shape) > 0.95)),
    "constant": lambda w: torch.full_like(w, -0.3),
    "zero": torch.zeros_like,
    "positive": lambda w: w.abs() * 0.02,
    "shifted": lambda w: w * 0.01 - 0.05,
    "sparse": lambda w: w * (torch.rand(w.shape) > 0.8),
    "spike": lambda w: torch.eye(*w.shape) + w * 1e-3,
    "levels": lambda w: (w * 3).round().clamp(-8, 7) * 0.0107421875,
    "mirrored": lambda w: torch.cat([w[:, ::2], -w[:, ::2]], dim=1) * 0.1,
    "tiny": lambda w: w * 2.0**-22,
    "small": lambda w: w * 2.0**-12,
    "huge": lambda w: w * 2.0**14,
    "various": lambda w: w * 10.0 ** torch.empty(w.shape[0], 1).uniform_(-7, 4),
}


def weights(rows: int = ROWS, columns: int = COLS) -> torch.Tensor:
    """(kinds * rows, columns), every kind below the other."""
    return torch.cat([kind(torch.randn(rows, columns)) for kind in KINDS.values()])


@pytest.fixture(autouse=True)
def always_prunes(monkeypatch):
    monkeypatch.setattr(range_search, "_TABLE_FROM", 0)


def check(weight: torch.Tensor, grid: Grid, p: float = 2.5, scale_dtype: str = "auto", signed: bool = False) -> None:
    scale, zero = choose_range(weight, grid, "lp", p, scale_dtype, signed)
    slow_scale, slow_zero = choose_range_slowly(weight, grid, p, scale_dtype, signed)
    assert torch.equal(scale, slow_scale)
    assert grid.symmetric or torch.equal(zero, slow_zero)


SIDES = pytest.mark.parametrize(
    ("symmetric", "signed"), [(True, True), (True, False), (False, False)], ids=["signed", "positive", "asym"]
)


@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_equals_judging_every_candidate(bits, dtype, symmetric, signed):
    check(weights().to(dtype), Grid(bits, 32, symmetric), signed=signed)


@SIDES
@pytest.mark.parametrize("group_size", [16, 48, -1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equals_judging_every_candidate_in_groups_and_channels(bits, group_size, symmetric, signed):
    check(weights().bfloat16(), Grid(bits, group_size, symmetric), signed=signed)
    check(weights(2, 1104), Grid(bits, group_size, symmetric), signed=signed)


@SIDES
@pytest.mark.parametrize("p", [0.7, 1.3, 2.0, 2.4, 3.0, 4.0, 12.0])
def test_equals_judging_every_candidate_in_other_norms(p, symmetric, signed):
    for bits in (3, 4):
        check(weights().bfloat16(), Grid(bits, 32, symmetric), p, signed=signed)


@SIDES
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_equals_judging_every_candidate_in_other_scale_dtypes(scale_dtype, bits, symmetric, signed):
    check(weights(), Grid(bits, 32, symmetric), scale_dtype=scale_dtype, signed=signed)


@SIDES
@pytest.mark.parametrize("chunk", [chunks.CPU_CHUNK, 1000])
@pytest.mark.parametrize("bits", [2, 4])
def test_equals_judging_every_candidate_of_a_tensor(monkeypatch, bits, chunk, symmetric, signed):
    monkeypatch.setattr(chunks, "CPU_CHUNK", chunk)
    for kind in KINDS.values():
        check(kind(torch.randn(ROWS, COLS)).bfloat16(), Grid(bits, 0, symmetric), signed=signed)


@SIDES
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 5])
def test_no_bound_is_above_an_error(bits, scale_dtype, symmetric, signed):
    """Otherwise the best candidate may be left out. The scale is moved by up to half of its last bit."""
    lines, grid, p = weights(4).view(-1, 8), Grid(bits, 8, symmetric), 2.5
    lo, hi = lines.amin(dim=1).clamp_(max=0), lines.amax(dim=1).clamp_(min=0)
    ours = range_search._Candidates(lo, hi, grid, scale_dtype, signed)
    bound = range_search._bounds([lines], lo, hi, ours, grid, p, scale_dtype)
    line, which = (i.flatten() for i in torch.meshgrid(*map(torch.arange, bound.shape), indexing="ij"))
    errors = range_search._errors([lines], line, *ours.at(line, which), grid, p).view(bound.shape)
    assert (bound.double() * ours.reach.double().unsqueeze(1) ** p <= errors * range_search._MARGIN).all()
    assert (bound > 0).float().mean() > 0.1


@SIDES
def test_equals_judging_every_candidate_of_a_small_weight(monkeypatch, symmetric, signed):
    monkeypatch.setattr(range_search, "_TABLE_FROM", 1 << 30)
    check(weights(), Grid(4, 32, symmetric), signed=signed)
    check(weights(), Grid(2, -1, symmetric), signed=signed)


@SIDES
def test_a_device_that_a_context_names_changes_nothing(symmetric, signed):
    """As the meta device while a model is loaded, and inference mode."""
    weight, grid = weights(), Grid(4, 32, symmetric)
    range_search._table.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        there = choose_range(weight, grid, signed=signed)
    here = choose_range(weight, grid, signed=signed)
    assert torch.equal(there[0], here[0])


@pytest.mark.parametrize(("bits", "most"), [(2, 0.1), (3, 0.12), (4, 0.15), (8, 0.25)])
def test_few_candidates_are_judged(monkeypatch, bits, most):
    judged = 0
    judge = range_search._error

    def counted(part, line, *args):
        nonlocal judged
        judged += len(line)
        return judge(part, line, *args)

    monkeypatch.setattr(range_search, "_error", counted)
    choose_range((torch.randn(64, 1024) * 0.02).bfloat16(), Grid(bits, 128))
    assert judged < most * 64 * 8 * len(range_search.divisors_of(Grid(bits, 128)))


@pytest.mark.parametrize("p", [0.7, 1.0, 1.5, 2.0, 2.25, 2.4, 2.5, 3.0, 3.5, 4.0, 5.0])
def test_powers(p):
    miss = torch.cat([torch.zeros(1), torch.rand(200) * 0.5, torch.rand(20) * 300])
    found = range_search.power(miss.clone(), p, torch.empty_like(miss))
    torch.testing.assert_close(found.double(), miss.double() ** p, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("p", [1.0, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0])
def test_powers_are_made_of_operations_that_are_rounded_alike_everywhere(monkeypatch, p):
    monkeypatch.setattr(torch, "pow", None)
    miss = torch.rand(10)
    assert torch.isfinite(range_search.power(miss, p, torch.empty_like(miss))).all()
