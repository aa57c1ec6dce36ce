"""Keys and values rounded as an engine rounds them: compressed-tensors' own code, and vLLM's, written anew."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from torch import nn

from peft_lrqat.ops.kv_cache import CacheRounding, _signs, describe_cache, round_states

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDINGS = [
    CacheRounding(8, "transformers", 16),
    CacheRounding(4, "transformers", 8),
    CacheRounding(8, "vllm"),
    CacheRounding(4, "vllm"),
]


def states(dtype: torch.dtype = torch.float32, size: int = 16) -> torch.Tensor:
    """Keys as attention layers have them: (2, 3, 5, size), transposed; one of them is zero."""
    made = torch.randn(2, 5, 3, size).transpose(1, 2).to(dtype)
    made[0, 1, 2] = 0
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), [(8, 16), (4, 16), (4, 8)])
def test_transformers_rounds_so(bits: int, group_size: int, dtype: torch.dtype):
    x, module = states(dtype), nn.Module()
    module.quantization_status = QuantizationStatus.COMPRESSED
    scheme = {"type": "int", "symmetric": True, "strategy": "group", "dynamic": True}
    arguments = QuantizationArgs(num_bits=bits, group_size=group_size, **scheme)
    expected = forward_quantize(module, x, "k", arguments)
    assert torch.equal(round_states(x, CacheRounding(bits, "transformers", group_size)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vllm_rounds_to_8_bits_so(dtype: torch.dtype):
    x = states(dtype)
    rounded = round_states(x, CacheRounding(8, "vllm"))
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

    before, after = rotated(x), rotated(round_states(x.float(), CacheRounding(4, "vllm")).double())
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
    error = (round_states(constant, CacheRounding(4, "vllm")) - constant).abs().max()
    assert 0 < error < 1


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
def test_a_token_and_head_is_rounded_by_itself(rounding: CacheRounding):
    x = states()
    whole = round_states(x, rounding)
    parts = [round_states(x[:, :, i : i + 1], rounding) for i in range(x.shape[2])]
    assert torch.equal(torch.cat(parts, 2), whole)
    assert torch.equal(torch.stack([round_states(x[:, i], rounding) for i in range(3)], 1), whole)
    assert (whole[0, 1, 2] == 0).all()
    assert not torch.equal(whole, x)


@pytest.mark.parametrize("rounding", ROUNDINGS[1::2], ids=str)
def test_gradients_pass_and_compiled_it_is_the_same(rounding: CacheRounding):
    x = states(torch.bfloat16).requires_grad_()
    rounded = round_states(x, rounding)
    assert torch.equal(rounded, round_states(x.detach(), rounding))
    weight = torch.randn_like(rounded)
    (rounded * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    x.grad = None
    compiled = torch.compile(lambda states: round_states(states, rounding), backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(compiled, rounded)
    (compiled * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_the_operation_is_registered_well():
    torch.library.opcheck(torch.ops.peft_lrqat.round_states.default, (states().requires_grad_(), 4))


def test_a_default_device_is_not_asked():
    x, rounding = states(), CacheRounding(4, "vllm")
    expected = round_states(x, rounding)
    _signs.cache_clear()
    with torch.device("meta"):
        assert torch.equal(round_states(x, rounding), expected)


def test_nothing_and_what_cannot_be():
    empty = torch.empty(1, 2, 0, 16)
    assert round_states(empty, CacheRounding(8, "vllm")).shape == empty.shape
    with pytest.raises(ValueError, match="16 numbers a head, which groups of 12 do not divide"):
        round_states(states(), CacheRounding(8, "transformers", 12))
    assert describe_cache(None) == "floats"
    for wrong, message in (
        ({"bits": 5}, "`bits` of a KV cache is 5; allowed are 8, 4"),
        ({"bits": True}, "`bits` of a KV cache is True"),
        ({"bits": 8, "rule": "other"}, "`rule` of a KV cache is 'other'"),
        ({"bits": 8}, "`group_size` of a KV cache is None; with the rule 'transformers' it is a positive"),
        ({"bits": 8, "rule": "vllm", "group_size": 8}, "with the rule 'vllm' it is None"),
    ):
        with pytest.raises(ValueError, match=message):
            CacheRounding(**wrong)
