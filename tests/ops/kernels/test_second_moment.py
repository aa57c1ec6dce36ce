"""The factored second moment by the kernels: norms are torch's but for rounding, and what is made of them exactly."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat.ops import kernels, reference_step
from peft_lrqat.ops.reference_step import FACTORS, new_state
from tests.problems import DEVICE


def gradients(shape: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    size = torch.logspace(-12, 3, shape[0]).unsqueeze(1) * torch.rand(1, shape[1])
    return [(torch.randn(shape) * size).to(DEVICE, dtype) for _ in range(3)]


def steps(module, grads: list[torch.Tensor], beta2: float) -> list[torch.Tensor]:
    state, found = new_state(grads[0].shape, "factored", None, torch.device(DEVICE)), []
    found += [module.update_factors(state, grad, beta2) for grad in grads]
    return [*found, *(state[name] for name in FACTORS)]


# less than a tile; more rows than one, and more sums of columns than are added up at a time; more columns than one
SHAPES = ((1, 1), (5, 300), (4200, 7), (64, 512), (37, 2050))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_are_torchs_but_for_rounding(shape: tuple[int, int], dtype: torch.dtype):
    grads, beta2 = gradients(shape, dtype), 0.98
    found, expected = (steps(module, grads, beta2) for module in (kernels, reference_step))
    for kernel, plain in zip(found, expected, strict=True):
        assert kernel.shape == plain.shape
        torch.testing.assert_close(kernel, plain, rtol=2e-6, atol=0)
    for norms, grad in zip(found, grads, strict=False):
        torch.testing.assert_close(norms.double(), grad.double().norm(dim=1, keepdim=True), rtol=5e-7, atol=0)
    for once, again in zip(found, steps(kernels, grads, beta2), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("beta2", [0.98, 0.999, 0.0])
def test_what_is_made_of_norms_is_torchs_bit_for_bit(beta2: float):
    """Of norms that every order of summation gives."""
    grads = [torch.randint(-8, 9, (70, 300), device=DEVICE).float() for _ in range(3)]
    found, expected = (steps(module, grads, beta2) for module in (kernels, reference_step))
    for kernel, plain in zip(found, expected, strict=True):
        assert torch.equal(kernel, plain)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_column(bad: float):
    (grad, *_) = gradients((70, 300), torch.float32)
    grad[66, 258] = bad
    state = new_state(grad.shape, "factored", None, torch.device(DEVICE))
    norms = kernels.update_factors(state, grad, 0.98)
    rows, columns = torch.arange(70) == 66, torch.arange(300) == 258
    for found, broken in ((norms, rows), (state["exp_avg_sq_rows"], rows), (state["exp_avg_sq_columns"], columns)):
        assert torch.equal(~found.isfinite().flatten().cpu(), broken)
