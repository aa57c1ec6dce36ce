"""Stacks of experts by the kernels: W^ is the reference's bit for bit, gradients are those of the formula.

An interpreted tile takes milliseconds, so these stacks are small: `slow` ones have more tiles, in every direction.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat.ops import use_kernels
from peft_lrqat.ops.kernels import experts as kernels
from peft_lrqat.ops.kernels import tiles, weight
from tests.experts import E, Stack, check_linear, check_weights, linear, listed, routed, stack, weights
from tests.problems import BY_CHANNEL, DEVICE, GRANULARITY

#: Neither divides into tiles, nor into what torch's grouped product takes; both do.
ODD, EVEN = {"rows": 5, "cols": 18}, {"rows": 16, "cols": 32}
KINDS = [(2, "int"), (3, "int"), (4, "int"), (8, "int"), (4, "fx8"), (4, "bf16")]
LARGE = [{"rows": 33, "cols": 27}, {"rows": 64, "cols": 72}]


def check_weights_are_equal(s: Stack, name: str, dtype: torch.dtype = torch.float32) -> None:
    expected, there = weights(s, listed(s, name), dtype), s.there()
    with use_kernels(True):
        assert torch.equal(weights(there, listed(there, name), dtype).cpu(), expected)


def check(s: Stack, name: str) -> None:
    with use_kernels(True):
        check_linear(s.there(), name)


@pytest.mark.parametrize(("group_size", "deterministic"), [*((size, False) for size in GRANULARITY), (-1, True)])
def test_product_and_every_gradient(group_size, deterministic):
    """By rows where a scale serves a row, and by G elsewhere, or where the order of every sum must be fixed."""
    torch.use_deterministic_algorithms(True, warn_only=not deterministic)
    check(stack(4, group_size, group_size == -1, **ODD), "some")


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_every_stored_base(number):
    bits, downcast = KINDS[number]
    s = stack(bits, GRANULARITY[number % 4], number % 2 == 0, downcast, **ODD)
    check_weights_are_equal(s, ("all", "some", "one")[number % 3], (torch.float32, torch.bfloat16)[number % 2])


@pytest.mark.parametrize(("name", "group_size"), [("twice", 9), ("none", 9), ("one", -1), ("all", 0)])
def test_weights_and_every_gradient(name, group_size):
    with use_kernels(True):
        check_weights(stack(3, group_size, False, "int", **ODD).there(), name)


def test_a_stack_in_parts(monkeypatch):
    """One expert at a time, or two; what is as large as a weight is then as large as those of so many."""
    s = stack(4, 0, False, **EVEN).there()
    x, ends, dy = routed(s, "all")
    sizes = []

    def noted(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, run=kernels.grouped_mm) -> torch.Tensor:
        product = run(a, b, ends)
        sizes.extend(t.numel() for t in (product, b) if t.ndim == 3)
        return product

    monkeypatch.setattr(kernels, "grouped_mm", noted)
    found = []
    with use_kernels(True):
        for experts in (3, 2):
            monkeypatch.setattr(kernels, "PART_BYTES", experts * 16 * 32 * x.element_size())
            found.append(s.results(linear(s, x, ends), dy, x))
            assert max(sizes) == experts * 16 * 32
            sizes.clear()
    for other in found[1:]:
        for name, value in found[0].items():
            # summed over all experts; and on a GPU shares of clipped entries are added in any order
            if name == "shift" or (DEVICE == "cuda" and name in ("A", "B")):
                torch.testing.assert_close(other[name], value)
            else:
                assert torch.equal(other[name], value), name


def test_low_precision():
    s = stack(4, -1, **EVEN).there()
    x, ends, dy = routed(s, "some", torch.bfloat16)
    exact = x.detach().float().requires_grad_()
    with use_kernels(True):
        found = s.results(linear(s, x, ends), dy, x)
        truth = s.results(linear(s, exact, ends), dy.float(), exact)
    for name, value in truth.items():
        assert found[name].dtype == (torch.bfloat16 if name in ("x", "y") else torch.float32)
        off = (found[name].float() - value).norm() / value.norm()
        assert off < 2 * torch.finfo(torch.bfloat16).eps, name


def test_what_is_not_asked_for():
    s = stack(4, BY_CHANNEL, **ODD).there()
    x, ends, dy = routed(s, "one")
    with use_kernels(True):
        whole = s.results(linear(s, x, ends), dy, x)
        for wanted in (("x",), ("shift",)):
            leaves = {
                name: leaf.detach().requires_grad_(name in wanted) for name, leaf in (s.leaves | {"x": x}).items()
            }
            asked = dataclasses.replace(s, **{name: leaves[name] for name in s.leaves})
            found = torch.autograd.grad(linear(asked, leaves["x"], ends), [leaves[name] for name in wanted], dy)
            assert all(torch.equal(value, whole[name]) for name, value in zip(wanted, found, strict=True))


def test_no_tokens():
    s = stack(4, -1, **ODD).there()
    x, ends, dy = routed(s, "none")
    with use_kernels(True):
        assert not any(value.any() for value in s.results(linear(s, x, ends), dy, x).values())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", LARGE, ids=str)
@pytest.mark.parametrize("group_size", GRANULARITY)
@pytest.mark.parametrize("name", ["all", "some", "one"])
def test_more_tiles(name, group_size, sizes):
    s = stack(4, group_size, name == "all", "int" if name == "one" else "fx8", **sizes)
    check_weights_are_equal(s, name)
    check_weights_are_equal(s, name, torch.bfloat16)
    check(s, name)


@pytest.mark.slow
def test_several_tiles_a_program(monkeypatch):
    monkeypatch.setattr(tiles, "ENOUGH_PROGRAMS", 2)
    for cached in ("tiling", "_launch"):
        monkeypatch.setattr(weight, cached, getattr(weight, cached).__wrapped__)
    assert tiles.tiling.__wrapped__(128, 64, 1, stack=3).loop == 4
    s = stack(4, -1, rows=128, cols=64)
    check_weights_are_equal(s, "some")
    check(s, "some")


@pytest.mark.skipif(DEVICE == "cpu", reason="there is nothing to synchronise with")
def test_no_synchronisation_where_one_part_holds_all():
    """With a rank that torch's grouped product takes, a multiple of 8: the experts are multiplied one by one else."""
    s = stack(4, -1, rows=64, cols=64)
    fill = 8 - s.A.shape[0] // E
    A = torch.nn.functional.pad(s.A.detach().unflatten(0, (E, -1)), (0, 0, 0, fill)).flatten(0, 1)
    B = torch.nn.functional.pad(s.B.detach().unflatten(1, (-1, E)), (0, 0, 0, fill)).flatten(1)
    s = dataclasses.replace(s, A=A.requires_grad_(), B=B.requires_grad_()).there()
    x, ends, dy = routed(s, "all", torch.bfloat16)
    with use_kernels(True):
        s.results(linear(s, x, ends), dy, x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            s.results(linear(s, x, ends), dy, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
