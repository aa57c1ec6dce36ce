"""Keys and values as vLLM rounds them: its rules, written anew."""

from __future__ import annotations

import math

import pytest
import torch

from peft_lrqat.ops.reference_cache import rotation_signs, rounded_states


def states(dtype: torch.dtype = torch.float32, size: int = 16) -> torch.Tensor:
    """Keys as attention layers have them: (2, 3, 5, size), transposed; one of them is zero."""
    made = torch.randn(2, 5, 3, size).transpose(1, 2).to(dtype)
    made[0, 1, 2] = 0
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vllm_rounds_to_8_bits_so(dtype: torch.dtype):
    x = states(dtype)
    rounded = rounded_states(x, 8)
    for row, found in zip(x.reshape(-1, 16), rounded.reshape(-1, 16), strict=True):
        numbers = row.float()
        scale = torch.clamp(numbers.abs().max() / 127, min=1e-6)
        scaled = numbers * (1 / scale)
        codes = torch.tensor([math.trunc(v + math.copysign(0.5, v)) for v in scaled.tolist()]).clamp(-128, 127)
        assert torch.equal(found, (codes * scale).to(dtype))


@pytest.mark.parametrize("size", [16, 24])  # 24: three blocks of 8
def test_vllm_rounds_to_4_bits_so(size: int):
    """Rotated, a number is within half a step of a level; the rotation is vLLM's, with its signs."""
    x = states(size=size).double()
    block = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    signs = [1, -1, 1, 1, -1, -1, -1, -1, 1, -1, -1, 1, 1, -1, 1, -1]  # as printed by vLLM 0.32's `_get_rht_signs`

    def rotated(values: torch.Tensor) -> torch.Tensor:
        blocks = values.unflatten(-1, (-1, block)) * torch.tensor(signs[:block], dtype=torch.float64)
        return (blocks @ matrix).flatten(-2)

    before, after = rotated(x), rotated(rounded_states(x.float(), 4).double())
    low, high = before.amin(-1, keepdim=True), before.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-6)
    # the zero point is a whole number too, so the levels lie up to half a step off; and an end may be cut
    assert ((before - after).abs() <= 1.001 * step + 1e-5).all()
    levels = (after / step).sub((after / step).round()).abs()
    assert (levels < 1e-3).all()
    assert all(len(row.round(decimals=3).unique()) <= 16 for row in (after / step).reshape(-1, size))


def test_signs_are_those_of_the_size():
    """Every size draws anew from vLLM's seed; without signs the rotation of a constant is one number."""
    constant = torch.ones(1, 1, 1, 64)
    error = (rounded_states(constant, 4) - constant).abs().max()
    assert 0 < error < 1


def test_a_default_device_is_not_asked():
    x = states()
    expected = rounded_states(x, 4)
    rotation_signs.cache_clear()
    with torch.device("meta"):
        assert torch.equal(rounded_states(x, 4), expected)
