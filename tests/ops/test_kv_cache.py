"""Keys and values rounded as an engine rounds them: compressed-tensors' own code, and what all rules share."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from torch import nn

from peft_lrqat.ops.kv_cache import CacheRounding, describe_cache, round_states

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
