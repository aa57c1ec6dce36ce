"""Stochastic rounding: the published generator, numbers that depend on the position only, and no bias."""

from __future__ import annotations

import pytest
import torch

from peft_lrqat.grid import Grid
from peft_lrqat.rounding import philox, random_words, round_stochastically, spare_dither, stream_key, uniform


def number(value: int) -> torch.Tensor:
    return torch.tensor(value - (1 << 64) if value >= 1 << 63 else value)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    # the known answers of Random123's distribution (kat_vectors, philox4x32 10)
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (1 << 64) - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator_is_philox(counter: tuple, key: int, words: tuple):
    assert tuple(int(word) for word in philox(*map(number, counter), number(key))) == words


def test_a_number_depends_on_its_place_only():
    rows, key, step = torch.arange(9), torch.tensor(stream_key(0, "a")), torch.tensor(3)
    whole = random_words(rows, 45, step, key)
    assert torch.equal(random_words(rows[4:7], 45, step, key), whole[4:7])
    assert torch.equal(random_words(rows, 44, step, key), whole[:, :44])
    # word column % 4 of the counter (column // 4, row, step, 0), as the documentation says
    found = philox(*(torch.tensor(c) for c in (7 // 4, 5, 3, 0)), key)
    assert whole[5, 7] == found[7 % 4]
    for other in (random_words(rows, 45, step + 1, key), random_words(rows, 45, step, key + 1)):
        assert (other == whole).float().mean() < 0.05
    assert stream_key(0, "a") != stream_key(0, "b")
    assert stream_key(0, "a") != stream_key(1, "a")


def test_uniform_numbers_are_uniform_and_never_zero_or_one():
    words = random_words(torch.arange(64), 1024, torch.tensor(0), torch.tensor(1))
    ends = torch.tensor([0, 0xFFFFFFFF])
    for u in (uniform(words), spare_dither(words, 0, 4), spare_dither(words, 4, 5)):
        assert abs(u.mean() - 0.5) < 5 * 0.29 / 256
        assert abs(u.var() - 1 / 12) < 0.003
    assert uniform(ends).tolist() == [2.0**-24, 1 - 2.0**-24]
    assert ((words >= 0) & (words < 1 << 32)).all()
    apart = torch.corrcoef(torch.stack([uniform(words).flatten(), spare_dither(words, 4, 5).flatten()]))
    assert abs(apart[0, 1]) < 0.02


@pytest.mark.parametrize("grid", [Grid(1.58), Grid(2), Grid(8)], ids=lambda g: g.describe())
def test_rounding_goes_up_as_often_as_the_fraction_says(grid: Grid):
    u = uniform(random_words(torch.arange(100), 1000, torch.tensor(0), torch.tensor(5)))
    for move in (0.25, -0.25, 0.9, 1e-3):
        found = round_stochastically(torch.zeros_like(u), torch.full_like(u, move), u, grid)
        assert set(found.unique().tolist()) <= {-1.0, 0.0, 1.0}
        spread = (abs(move) * (1 - abs(move)) / u.numel()) ** 0.5
        assert abs(found.mean() - move) < 5 * spread
    low, high = torch.tensor(float(grid.qmin)), torch.tensor(float(grid.qmax))
    assert (round_stochastically(low, torch.full_like(u, -3.3), u, grid) == grid.qmin).all()
    assert (round_stochastically(high, torch.full_like(u, 3.3), u, grid) == grid.qmax).all()
    for q in (low, high):
        assert (round_stochastically(q, torch.zeros_like(u), u, grid) == q).all()
