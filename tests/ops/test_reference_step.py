"""The optimizer step on packed codes, by the reference: its compact state, and what depends on nothing else."""

from __future__ import annotations

import pytest
import torch

from peft_lrqat.grid import Grid
from peft_lrqat.ops import step_codes, use_kernels
from peft_lrqat.ops.reference_step import (
    Rule,
    decode_momentum,
    decode_second_moment,
    encode_momentum,
    encode_second_moment,
    new_state,
)
from peft_lrqat.packing import pack, unpack
from peft_lrqat.rounding import spare_dither
from tests.problems import DEVICE

STATES = ("8bit", "factored", "fp32")


@pytest.mark.parametrize("columns", [5, 256, 300])
def test_compact_momentum_is_unbiased(columns: int):
    m = torch.randn(7, columns) * torch.logspace(-8, 3, 7).unsqueeze(1)
    m[3] = 0
    total, times = torch.zeros_like(m), 400
    for _ in range(times):
        total += decode_momentum(*encode_momentum(m, torch.rand(m.shape)))
    largest = m.abs().amax(dim=1, keepdim=True)
    cell = 3 / 127 * largest * ((m.abs() / largest.clamp(min=1e-30)) ** (1 / 3) + 1 / 127) ** 2
    assert ((total / times - m).abs() <= cell * 5 * 0.5 / times**0.5 + 1e-12).all()


def test_compact_momentum_is_exact_at_every_code_and_between_two_of_them_the_dither_decides():
    k = torch.arange(-127.0, 128)
    for unit in (1.0, 3.7e-7, 8e4):
        m = (k**3 * unit).unsqueeze(0)
        for dither in (1e-6, 1 - 1e-6):
            codes, units = encode_momentum(m.clone(), torch.full_like(m, dither))
            # the unit, and with it every cube, is rounded: at most the neighbouring code then, by a dither at its end
            assert ((codes - k).abs() <= 1).all()
            torch.testing.assert_close(units, torch.full((1, 1), unit))
        codes, units = encode_momentum(m, torch.full_like(m, 0.5))
        assert torch.equal(codes.float(), k.unsqueeze(0))
        torch.testing.assert_close(decode_momentum(codes, units), m)


@pytest.mark.parametrize("outlier", [300.0, 1000.0])
@pytest.mark.parametrize("constant", [True, False])
def test_a_column_of_large_gradients_does_not_drown_its_neighbours(outlier: float, constant: bool):
    torch.manual_seed(0)
    size = torch.ones(1, 256)
    size[0, 17] = outlier
    state = torch.zeros(4, 256, dtype=torch.int8), torch.zeros(4, 1)
    exact, found, true, wrong = torch.zeros(4, 256), 0.0, 0.0, 0.0
    for step in range(150):
        grad = size * (torch.ones(4, 256) if constant else torch.randn(4, 256))
        exact = exact * 0.9 + grad * 0.1
        m = decode_momentum(*state) * 0.9 + grad * 0.1
        if step >= 50:
            others = size[0] == 1
            found, true = found + float(m[:, others].sum()), true + float(exact[:, others].sum())
            wrong += float((m - exact)[:, others].square().mean() / exact[:, others].square().mean())
        state = encode_momentum(m, spare_dither(torch.randint(2**32, m.shape), 4, 5))
    assert (wrong / 100) ** 0.5 < 0.3  # a linear code: 4.2 of 1000
    if constant:
        assert found == pytest.approx(true, rel=0.01)


@pytest.mark.parametrize("beta2", [0.99, 0.999])
def test_compact_second_moment_follows_gradients_that_fall(beta2: float):
    torch.manual_seed(0)
    state = torch.zeros(4, 256, dtype=torch.uint8), torch.zeros(4, 1, dtype=torch.int16)
    exact = torch.zeros(4, 256)
    for step in range(900):
        square = (torch.randn(4, 256) * (1.0 if step < 300 else 0.03)).square() * (1 - beta2)
        exact = exact * beta2 + square
        v = decode_second_moment(*state) * beta2 + square
        state = encode_second_moment(v, spare_dither(torch.randint(2**32, v.shape), 0, 4))
        if step in (299, 599, 899):
            assert float(v.sum() / exact.sum()) == pytest.approx(1, abs=0.05)  # four bits of dither: 2.5 at 0.999


@pytest.mark.parametrize("columns", [5, 256, 300])
def test_compact_second_moment_is_unbiased_over_many_octaves(columns: int):
    largest = torch.logspace(-20, 6, 7).unsqueeze(1)
    v = torch.rand(7, columns).square() * largest
    v[:, 0] = largest[:, 0]
    total, times = torch.zeros_like(v), 400
    for _ in range(times):
        total += decode_second_moment(*encode_second_moment(v, torch.rand(v.shape)))
    here = v > 2.0**-28 * largest  # sixteen octaves of the root, less what the block's largest may be rounded up
    assert here.float().mean() > 0.9
    assert ((total / times / v - 1).abs()[here] < 5 * 0.07 / times**0.5).all()
    zero = decode_second_moment(*encode_second_moment(torch.zeros(2, columns), torch.rand(2, columns)))
    assert (zero == 0).all()


def stepped(grid: Grid, state: str, *, strided: bool = False, times: int = 3) -> dict[str, torch.Tensor]:
    """A weight after some steps: everything that they change."""
    torch.manual_seed(0)
    rows, columns = 19, 70
    codes = torch.randint(grid.qmin, grid.qmax + 1, (rows, columns), dtype=torch.int8)
    packed, scale = pack(codes, grid.code_bits), torch.rand(grid.scale_shape(rows, columns)) + 0.01
    if strided:
        packed, scale = (t.t().contiguous().t() for t in (packed, scale))
    stream = torch.tensor([-(2**60) - 7, 3])
    unit = "weight" if grid.ternary else "grid"
    rule = Rule(grid, columns, 0.9, 0.98, 1e-8, 0.1, True, unit, state, latent_weights=grid.ternary)
    held = new_state(torch.Size((rows, columns)), state, rule.momentum, packed.device)
    for _ in range(times):
        step_codes(packed, scale, stream, torch.randn(rows, columns), held, torch.tensor(0.3), rule)
    assert (unpack(packed, grid.code_bits, columns) != codes).float().mean() > 0.1
    return {"packed": packed, "scale": scale, "stream": stream, **held}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "grid", [Grid(3, 10), Grid(4, 0), Grid(1.58, 0), Grid(1.58, -1)], ids=lambda grid: grid.describe()
)
def test_row_chunks_and_strides_change_nothing(grid: Grid, state: str, monkeypatch: pytest.MonkeyPatch):
    whole = stepped(grid, state)
    assert whole["stream"].tolist() == [-(2**60) - 7, 6 + grid.ternary]  # latent weights start with a rounding
    assert whole["step"] == 3
    # kernels write to where tensors without gaps have their elements; of the CPU's, the interpreter's do
    with use_kernels(DEVICE == "cpu"):
        runs = [stepped(grid, state, strided=True)]
    monkeypatch.setattr("peft_lrqat.chunks.CPU_CHUNK", 4 * 70)
    runs.append(stepped(grid, state))
    for run in runs:
        for name, value in whole.items():
            # means of g^2 are the one thing that is summed over rows
            if state == "factored" and name != "packed" and name.startswith("exp"):
                torch.testing.assert_close(run[name].float(), value.float(), rtol=1e-6, atol=1e-2)
            else:
                assert torch.equal(run[name], value), name
