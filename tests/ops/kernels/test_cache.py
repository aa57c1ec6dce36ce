"""Keys and values by the kernel against the reference: the same numbers, for all sizes of heads and ways to lie."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat.ops import kernels, use_kernels
from peft_lrqat.ops.kernels import cache
from peft_lrqat.ops.kv_cache import CacheRounding, round_states
from peft_lrqat.ops.reference_cache import rounded_states
from tests.problems import DEVICE


def keys(tokens: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """(2, 3, tokens, size), as attention has them: transposed; of many magnitudes, and what is no number among them."""
    sizes = 10.0 ** torch.arange(-8, 4, device=DEVICE).repeat(-(-tokens * 3 // 12))[: tokens * 3].view(tokens, 3, 1)
    made = (torch.randn(2, tokens, 3, size, device=DEVICE) * sizes).to(dtype)
    made[0, 0, 0] = 0
    made[0, 0, 1] = made[0, 0, 1, 0]  # all alike: rotated, one of them is large
    made[0, 1, 0, size // 2], made[0, 1, 1, 0], made[0, 1, 2, -1] = torch.nan, torch.inf, -torch.inf
    made[1, 0, 2, 0], made[1, 0, 2, 1:] = 127, torch.arange(1, size) - 0.5  # ties, scale 1
    return made.transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_numbers_are_the_references(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "_TILE", 1024)  # several programs
    cache._launch.cache_clear()
    for tokens, size in ((8, 64), (2, 128), (3, 80), (7, 24), (4, 2), (3, 7)):
        x = keys(tokens, size, dtype)
        found, expected = kernels.rounded_states(x, bits), rounded_states(x, bits)
        assert found.dtype == dtype
        assert found.isfinite().any()
        assert torch.equal(found.nan_to_num(7e3), expected.nan_to_num(7e3)), size
    cache._launch.cache_clear()


@pytest.mark.parametrize("bits", [8, 4])
def test_however_they_lie(bits: int):
    """What lies densely is not copied, and what is computed lies as it does: as torch's own operations have it."""
    x = torch.randn(2, 6, 4, 16, device=DEVICE)
    for states in (
        x,
        x.transpose(1, 2),
        x.permute(2, 0, 1, 3),
        x[:, ::2],
        x[..., :8],
        x.transpose(2, 3),
        x[0],
        x[0, 0, 0],
    ):
        found = kernels.rounded_states(states, bits)
        assert torch.equal(found, rounded_states(states, bits))
        if states.numel() == x.numel() and states.stride(-1) == 1:
            assert found.stride() == states.stride()
    one = x[:1, :, :1].expand(3, 6, 4, 16)
    assert torch.equal(kernels.rounded_states(one, bits), rounded_states(one, bits))
    assert kernels.rounded_states(x[:, :0], bits).shape == (2, 0, 4, 16)


@pytest.mark.parametrize("bits", [8, 4])
def test_it_runs_where_kernels_do(bits: int, monkeypatch: pytest.MonkeyPatch):
    x, rounding, calls = torch.randn(1, 2, 3, 8, device=DEVICE, requires_grad=True), CacheRounding(bits, "vllm"), []
    run = kernels.rounded_states

    def counted(*args):
        calls.append(args)
        return run(*args)

    monkeypatch.setattr(kernels, "rounded_states", counted)
    with use_kernels(True):
        found = round_states(x, rounding)
        round_states(x.double(), rounding)  # none of fp64
    assert len(calls) == 1
    with use_kernels(False):
        assert torch.equal(found, round_states(x, rounding))
    dy = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(found, x, dy)[0], dy)  # straight through
