"""Rounded inputs by the kernel against the reference: the same numbers, at odd shapes and with values that are none."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat.ops import kernels
from peft_lrqat.ops.kernels import inputs
from peft_lrqat.ops.reference_inputs import ACTIVATION_RULES, rounded_inputs
from tests.problems import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ACTIVATION_RULES)
def test_the_numbers_are_the_references(rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    sizes = torch.tensor([1e-6, 0.01, 1, 300, 0], device=DEVICE).view(5, 1)
    for bits, group_size, width in ((8, -1, 45), (4, -1, 64), (4, 9, 45), (8, 32, 64), (4, -1, 130)):
        x = (torch.randn(3, 5, width, device=DEVICE) * sizes).to(dtype)
        x[0, 1, 3] = 0.5 * x[0, 1].abs().max()  # a tie, or near one
        x[2, 0, 7], x[2, 1, 0] = torch.nan, torch.inf
        monkeypatch.setattr(inputs, "_TILE", 64 if width == 130 else 4096)  # a row in several tiles
        inputs._launch.cache_clear()
        found, expected = (code(x, rule, bits, group_size) for code in (kernels.rounded_inputs, rounded_inputs))
        assert found.dtype == dtype
        assert torch.equal(found.nan_to_num(7e3), expected.nan_to_num(7e3)), (bits, group_size)


def test_inputs_with_gaps_and_without_tokens():
    x = torch.randn(6, 4, device=DEVICE).t()
    assert torch.equal(kernels.rounded_inputs(x, "vllm", 8, -1), rounded_inputs(x, "vllm", 8, -1))
    for code in (kernels.rounded_inputs, rounded_inputs):
        assert code(torch.empty(2, 0, 4, device=DEVICE), "vllm", 8, 2).shape == (2, 0, 4)
