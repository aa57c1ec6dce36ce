"""Inputs rounded with a fixed scale by the kernels against the reference: the same numbers, and gradients."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat.grid import SCALE_DTYPES
from peft_lrqat.ops import kernels, reference_inputs, use_kernels
from peft_lrqat.ops.kernels import static_inputs
from peft_lrqat.ops.static_inputs import LearnedScale, round_learned, round_static
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
        for given in ((scale, bits), (scale.log2(), bits, "auto")):
            found, expected = (code.rounded_static(x, *given) for code in (kernels, reference_inputs))
            assert found.dtype == dtype
            assert torch.equal(found.nan_to_num(7e3), expected.nan_to_num(7e3))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale_dtype", [None, "auto", "fp32"])
def test_the_gradients_are_the_references(scale_dtype, dtype: torch.dtype, needs: tuple[bool, bool]):
    scale, x = torch.tensor([0.0195], device=DEVICE), inputs(dtype, 0.0195)
    scale = scale if scale_dtype is None else scale.log2()
    dy = torch.randn_like(x)
    for given in (x, x.nan_to_num(1.0)):
        how = (scale, 8, scale_dtype, *needs)
        found, expected = (code.static_gradients(dy, given, *how) for code in (kernels, reference_inputs))
        assert [f.dtype for f in found] == [e.dtype for e in expected] == [dtype, torch.float32]
        assert torch.equal(found[0], expected[0])  # what is no number has no gradient
        assert found[1].shape == expected[1].shape
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-2, equal_nan=True)
        again = kernels.static_gradients(dy, given, *how)[1]
        assert torch.equal(again.nan_to_num(), found[1].nan_to_num())


@pytest.mark.parametrize("programs", [2048, 3, 1])
@pytest.mark.parametrize("shape", [(7, 1501), (1,), (2, 4096), (3, 2048)], ids=str)
def test_the_scales_gradient_has_no_error_of_its_own(shape, programs: int, monkeypatch: pytest.MonkeyPatch):
    """Whole numbers, whose sum is exact in any order: all of them are counted, and once, however few programs do it."""
    monkeypatch.setattr(static_inputs, "_PROGRAMS", programs)
    static_inputs._launch.cache_clear()
    x = torch.randint(-300, 300, shape, device=DEVICE).float()
    dy = torch.randint(-4, 5, shape, device=DEVICE).float() if x.numel() > 1 else torch.tensor([3.0], device=DEVICE)
    for scale, scale_dtype in ((torch.ones(1, device=DEVICE), None), (torch.zeros(1, device=DEVICE), "auto")):
        how = (scale, 8, scale_dtype)
        assert torch.equal(*(code.rounded_static(x, *how) for code in (kernels, reference_inputs)))
        found, expected = (code.static_gradients(dy, x, *how, True, True) for code in (kernels, reference_inputs))
        assert all(map(torch.equal, found, expected))
        assert x.numel() == 1 or found[1].abs() > 100
    static_inputs._launch.cache_clear()


def test_however_they_lie():
    scale, x = torch.tensor([0.0195], device=DEVICE), torch.randn(4, 6, 8, device=DEVICE)
    for given in (x.transpose(0, 1), x[:, ::2], x.transpose(1, 2), x[:, :0], x[0, 0], x[:1].expand(3, 6, 8)):
        for dy in (torch.randn_like(given), torch.randn(1, device=DEVICE).expand(given.shape)):
            assert torch.equal(*(code.rounded_static(given, scale, 8) for code in (kernels, reference_inputs)))
            how = (scale, 8, None, True, True)
            found, expected = (code.static_gradients(dy, given, *how) for code in (kernels, reference_inputs))
            assert torch.equal(found[0], expected[0])
            torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_the_scale_is_the_references(scale_dtype: str, dtype: torch.dtype):
    """Half a grid of 4 bits is seven scales: what a huge input is rounded to, without a rounding of its own."""
    log2 = torch.cat([torch.linspace(-30, 20, 200), torch.tensor([-200.0, 200.0, torch.nan, -24, 15.995])])
    huge = torch.full((1,), 3e38, device=DEVICE)
    for one in log2.to(DEVICE, dtype).split(1):
        found, expected = (code.rounded_static(huge, one, 4, scale_dtype) for code in (kernels, reference_inputs))
        assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1)), one
        scale = reference_inputs.input_scale(one, scale_dtype)
        assert not scale.isfinite() or torch.equal(expected, 7 * scale), one


def test_they_run_where_kernels_do(monkeypatch: pytest.MonkeyPatch):
    calls, found = [], []
    names = ["rounded_static", "static_gradients"]

    def counted(name, run, *args):
        calls.append(name)
        return run(*args)

    for name in names:
        monkeypatch.setattr(kernels, name, functools.partial(counted, name, getattr(kernels, name)))
    x, dy = torch.randn(5, 9, device=DEVICE).bfloat16(), torch.randn(5, 9, device=DEVICE).bfloat16()
    for use in (True, False):
        given, log2 = x.clone().requires_grad_(), torch.tensor([-5.03], device=DEVICE, requires_grad=True)
        with use_kernels(use):
            y = round_learned(given, LearnedScale(log2, "auto", 8))
            found.append([y, *torch.autograd.grad(y, [given, log2], dy)])
    assert calls == names
    (y, dx, dlog2), (y2, dx2, dlog22) = found
    assert torch.equal(y, y2)
    assert torch.equal(dx, dx2)
    torch.testing.assert_close(dlog2, dlog22, rtol=1e-5, atol=1e-4)
    with use_kernels(True):  # fp64 has none
        assert round_static(x.double(), torch.ones(1, device=DEVICE), 8).dtype == torch.float64
    assert len(calls) == 2
