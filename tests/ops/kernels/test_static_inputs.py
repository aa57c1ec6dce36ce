"""Inputs rounded with a fixed scale by the kernels against the reference: the same numbers, and gradients."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat.grid import SCALE_DTYPES
from peft_lrqat.ops import kernels, reference_inputs, use_kernels
from peft_lrqat.ops.static_inputs import round_static, static_scale
from tests.problems import DEVICE


def inputs(dtype: torch.dtype, scale: float) -> torch.Tensor:
    """(3, 25, 45): within the grid, outside of it, ties, and what is no number; the last program has too few."""
    x = scale * 60 * torch.randn(3, 25, 45, device=DEVICE)
    x[0] = scale * (torch.arange(25 * 45, device=DEVICE).view(25, 45) - 560.5) / 2  # halves: ties
    x[1, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    return x.to(dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_numbers_are_the_references(dtype: torch.dtype, bits: int):
    for number in (0.0195, 0.25, 3.1):  # the first and the last are rounded where the dtype is not fp32
        scale, x = torch.tensor([number], device=DEVICE), inputs(dtype, number)
        found, expected = (code.rounded_static(x, scale, bits) for code in (kernels, reference_inputs))
        assert found.dtype == dtype
        assert torch.equal(found.nan_to_num(7e3), expected.nan_to_num(7e3))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gradients_are_the_references(dtype: torch.dtype, needs: tuple[bool, bool]):
    scale, x = torch.tensor([0.0195], device=DEVICE), inputs(dtype, 0.0195)
    dy = torch.randn_like(x)
    for given in (x, x.nan_to_num(1.0)):
        found, expected = (code.static_gradients(dy, given, scale, 8, *needs) for code in (kernels, reference_inputs))
        assert [f.dtype for f in found] == [e.dtype for e in expected] == [dtype, torch.float32]
        assert torch.equal(found[0], expected[0])  # what is no number has no gradient
        assert found[1].shape == expected[1].shape
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-2, equal_nan=True)
        again = kernels.static_gradients(dy, given, scale, 8, *needs)[1]
        assert torch.equal(again.nan_to_num(), found[1].nan_to_num())


def test_the_scales_gradient_has_no_error_of_its_own():
    """Whole numbers, whose sum is exact in any order: all of them are counted, and once."""
    x = torch.randint(-300, 300, (7, 1501), device=DEVICE).float()
    dy, scale = torch.randint(-4, 5, x.shape, device=DEVICE).float(), torch.ones(1, device=DEVICE)
    found, expected = (code.static_gradients(dy, x, scale, 8, True, True) for code in (kernels, reference_inputs))
    assert all(map(torch.equal, found, expected))
    assert found[1].abs() > 1000


def test_however_they_lie():
    scale, x = torch.tensor([0.0195], device=DEVICE), torch.randn(4, 6, 8, device=DEVICE)
    for given in (x.transpose(0, 1), x[:, ::2], x.transpose(1, 2), x[:, :0], x[0, 0], x[:1].expand(3, 6, 8)):
        for dy in (torch.randn_like(given), torch.randn(1, device=DEVICE).expand(given.shape)):
            assert torch.equal(*(code.rounded_static(given, scale, 8) for code in (kernels, reference_inputs)))
            found, expected = (c.static_gradients(dy, given, scale, 8, True, True) for c in (kernels, reference_inputs))
            assert torch.equal(found[0], expected[0])
            torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_the_scale_is_the_references(scale_dtype: str, dtype: torch.dtype):
    log2 = torch.cat([torch.linspace(-30, 20, 700), torch.tensor([-200.0, 200.0, torch.nan, -24, 15.995])])
    log2 = log2.to(DEVICE, dtype)
    found, expected = (code.input_scale(log2, scale_dtype) for code in (kernels, reference_inputs))
    assert found.dtype == torch.float32
    assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))


def test_they_run_where_kernels_do(monkeypatch: pytest.MonkeyPatch):
    calls, found = [], []
    names = ["input_scale", "rounded_static", "static_gradients"]

    def counted(name, run, *args):
        calls.append(name)
        return run(*args)

    for name in names:
        monkeypatch.setattr(kernels, name, functools.partial(counted, name, getattr(kernels, name)))
    x, dy = torch.randn(5, 9, device=DEVICE).bfloat16(), torch.randn(5, 9, device=DEVICE).bfloat16()
    for use in (True, False):
        given, log2 = x.clone().requires_grad_(), torch.tensor([-5.03], device=DEVICE, requires_grad=True)
        with use_kernels(use):
            y = round_static(given, static_scale(log2, "auto"), 8)
            found.append([y, *torch.autograd.grad(y, [given, log2], dy)])
    assert calls == names
    (y, dx, dlog2), (y2, dx2, dlog22) = found
    assert torch.equal(y, y2)
    assert torch.equal(dx, dx2)
    torch.testing.assert_close(dlog2, dlog22, rtol=1e-5, atol=1e-4)
    with use_kernels(True):  # fp64 has none
        assert round_static(x.double(), torch.ones(1, device=DEVICE), 8).dtype == torch.float64
    assert len(calls) == 3
