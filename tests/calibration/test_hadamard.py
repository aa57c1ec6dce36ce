"""Orthogonal matrices of any size that spread an outlier evenly."""

from __future__ import annotations

import math

import pytest
import torch

from peft_lrqat.calibration.hadamard import Rotation, hadamard_factors

# hidden sizes and head sizes of models, and orders of both of Paley's constructions
SIZES = (1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 60, 64, 72, 80, 84, 96, 108, 112, 128, 140, 164, 208, 256, 576, 896, 960)


def rotation(size: int, seed: int = 0) -> Rotation:
    return Rotation(size, torch.Generator().manual_seed(seed))


def matrix(turn: Rotation) -> torch.Tensor:
    return turn(torch.eye(turn.size, dtype=torch.float64))


@pytest.mark.parametrize("size", SIZES)
def test_hadamard_matrices(size: int):
    factors = hadamard_factors(size)
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        product = torch.kron(product, factor)
    assert set(product.unique().tolist()) <= {1.0, -1.0}
    assert torch.equal(product @ product.T, size * torch.eye(size, dtype=torch.float64))
    found = matrix(rotation(size))
    assert rotation(size).random_hadamard
    assert torch.allclose(found.abs(), torch.full_like(found, size**-0.5), rtol=1e-12)


@pytest.mark.parametrize("size", [1152, 1536, 2304, 2560, 2880, 3584, 3840, 5120, 5376, 6656, 7168, 14336])
def test_hidden_sizes_of_models_have_one(size: int):
    assert math.prod(len(factor) for factor in hadamard_factors(size)) == size


@pytest.mark.parametrize("size", [3, 6, 10, 30, 52, 92, 100])
def test_other_sizes_are_turned_by_an_orthogonal_matrix(size: int):
    assert hadamard_factors(size) is None
    turn = rotation(size)
    assert not turn.random_hadamard
    found = matrix(turn)
    assert torch.allclose(found @ found.T, torch.eye(size, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("size", [64, 128])
def test_an_engine_that_turns_again_does_not_turn_back(size: int):
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    for factor in hadamard_factors(size):
        sylvester = torch.kron(sylvester, factor)
    assert (matrix(rotation(size)) @ sylvester / size**0.5).abs().max() < 0.6


def test_the_seed_decides():
    assert torch.equal(matrix(rotation(48)), matrix(rotation(48)))
    assert not torch.equal(matrix(rotation(48)), matrix(rotation(48, seed=1)))
    assert not torch.equal(matrix(rotation(6)), matrix(rotation(6, seed=1)))


@pytest.mark.parametrize("size", [6, 12, 48, 128])
def test_any_axis_and_several_heads(size: int):
    turn = rotation(size)
    q = matrix(turn)
    x = torch.randn(3, 2 * size, 5, dtype=torch.float64)
    found = turn(x, axis=1)
    wanted = torch.cat([torch.einsum("bni,nm->bmi", half, q) for half in x.split(size, dim=1)], dim=1)
    assert torch.allclose(found, wanted, atol=1e-12)
    assert turn(x.float(), axis=-2).dtype == torch.float32
