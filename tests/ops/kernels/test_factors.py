"""The factored second moment by the kernel is torch's, bit for bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat.ops import kernels, reference_step
from peft_lrqat.ops.reference_step import FACTORS, new_state
from tests.problems import DEVICE


def steps(module, shape: tuple[int, int], beta2: float, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    size = torch.logspace(-12, 3, shape[0]).unsqueeze(1) * torch.rand(1, shape[1])
    state, found = new_state(torch.Size(shape), "factored", None, torch.device(DEVICE)), []
    for _ in range(3):
        found.append(module.update_factors(state, (torch.randn(shape) * size).to(DEVICE, dtype), beta2))
    return [*found, *(state[name] for name in FACTORS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beta2", [0.98, 0.999, 0.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (1030, 7), (37, 2050)], ids=str)
def test_factors_are_torchs_bit_for_bit(shape: tuple[int, int], beta2: float, dtype: torch.dtype):
    found, expected = (steps(module, shape, beta2, dtype) for module in (kernels, reference_step))
    for kernel, plain in zip(found, expected, strict=True):
        assert kernel.shape == plain.shape
        assert torch.equal(kernel, plain)
