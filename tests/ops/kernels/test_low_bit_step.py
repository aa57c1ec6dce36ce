"""The optimizer step on packed codes by the kernel is the reference's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_lrqat import LowBitAdamW
from peft_lrqat.grid import Grid
from peft_lrqat.ops import kernels, reference_step, use_kernels
from peft_lrqat.packing import pack
from peft_lrqat.rounding import random_words
from peft_lrqat.tuners.lowbit_sr import LowBitTensor
from tests.low_bit_weights import kernel_weight
from tests.problems import DEVICE


@pytest.fixture(autouse=True)
def _norms_of_one_order(monkeypatch: pytest.MonkeyPatch):
    """The kernels sum the factored state's norms in another order (`test_second_moment.py`): here both have torch's."""
    monkeypatch.setattr(kernels, "update_factors", reference_step.update_factors)


BITS = (1.58, 2, 3, 4, 8)
STATES = ("8bit", "factored", "fp32")


def gradients(shape: tuple[int, int], steps: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Of many magnitudes, with zeros."""
    size = torch.logspace(-6, 1, shape[0]).unsqueeze(1) * torch.rand(1, shape[1])
    return [(torch.randn(shape) * size * (torch.rand(shape) > 0.1)).to(DEVICE, dtype) for _ in range(steps)]


def trained(kernels: bool, start: LowBitTensor, grads: list[torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """Everything that steps change, at the end."""
    p = nn.Parameter(start.clone())
    optimizer = LowBitAdamW([p], **options)
    with use_kernels(kernels):
        for grad in grads:
            p.grad = grad.float()
            if grad.dtype != torch.float32:  # no parameter has such a gradient, but the step takes it
                optimizer._step_codes(p, grad, optimizer.param_groups[0])
            else:
                optimizer.step()
    weight = p.detach()
    tensors = {name: value for name, value in optimizer.state[p].items() if isinstance(value, torch.Tensor)}
    return {"packed": weight.packed, "scale": weight.scale, "stream": weight.stream, **tensors}


def check(start: LowBitTensor, grads: list[torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """Equal bit for bit; returns what it came to."""
    found, expected = (trained(kernels, start, grads, **options) for kernels in (True, False))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    return found


# a block and a bit; less than a word; whole blocks, one row less than a program has; groups across words and blocks;
# whole programs, of five blocks, more than a program walks through
SHAPES = {-1: (5, 300), 0: (2, 45), 128: (7, 256), 25: (1, 275), 256: (8, 1280)}


# how codes are packed meets shapes and groups; the state does not see the bits
@pytest.mark.parametrize(("bits", "state"), [*zip(BITS, STATES * 2, strict=False), (3, "8bit"), (3, "factored")])
def test_steps_are_the_references_bit_for_bit(bits, state):
    for number, (group_size, shape) in enumerate(SHAPES.items()):
        start = kernel_weight(bits, group_size, shape)
        unit = "grid" if group_size == 128 else "weight"
        options = {"lr": 0.3 if unit == "grid" else 0.01, "lr_unit": unit, "error_feedback": number % 2 == 0}
        options |= {"weight_decay": 0.1, "betas": (0.9, 0.98), "latent_weights": False}
        found = check(start, gradients(shape, 2), state=state, **options)
        after = LowBitTensor(found["packed"], start.scale, start.stream, start.grid, shape[1])
        assert 0.01 < (after.codes() != start.codes()).float().mean() < 0.99
        padding = pack(after.codes(), after.grid.code_bits)
        assert torch.equal(padding, found["packed"])  # zeros past the end of a row
        assert found["stream"][1] == 2


@pytest.mark.parametrize(
    ("bits", "state"), [(1.58, "factored"), (1.58, "8bit"), (2, "fp32"), (3, "8bit"), (4, "factored")]
)
def test_latent_weights_are_the_references_bit_for_bit(bits, state):
    for number, (group_size, shape) in enumerate(SHAPES.items()):
        start = kernel_weight(bits, group_size, shape)
        options = {"latent_weights": True, "error_feedback": number % 2 == 0, "lr_unit": "weight" if number else "grid"}
        options["lr"] = 0.01 if number else 0.3
        found = check(start, gradients(shape, 3), state=state, weight_decay=0.1, **options)
        after = LowBitTensor(found["packed"], start.scale, start.stream, start.grid, shape[1])
        assert 0.01 < (after.codes() != start.codes()).float().mean() < 0.99
        assert found["latent_codes"].unique().numel() > 20
        follows = bits == 1.58 and number
        assert torch.equal(found["scale"], start.scale) != follows


@pytest.mark.parametrize("state", STATES)
def test_without_momentum(state):
    options = {"lr": 0.01, "state": state, "betas": (0.0, 0.98), "error_feedback": False}
    check(kernel_weight(3, 9, (3, 45)), gradients((3, 45), 2), **options)
    check(kernel_weight(1.58, 9, (3, 45)), gradients((3, 45), 2), **options, latent_weights=True)


@pytest.mark.parametrize("state", STATES)
def test_gradients_in_bf16_and_of_any_strides(state):
    options = {"lr": torch.tensor(0.01, device=DEVICE), "state": state, "error_feedback": True}
    check(kernel_weight(4, -1, (5, 45)), gradients((5, 45), 2, torch.bfloat16), **options)
    check(kernel_weight(4, -1, (5, 45)), [g.t() for g in gradients((45, 5), 1)], **options)


@pytest.mark.parametrize(("bits", "state"), list(zip(BITS, STATES * 2, strict=False)))
def test_a_learning_rate_of_zero_changes_no_code(bits, state):
    start = kernel_weight(bits, 9, (3, 45))
    found = check(start, gradients((3, 45), 2), lr=0.0, state=state, error_feedback=True, weight_decay=0.1)
    assert torch.equal(found["packed"], start.packed)
    assert torch.equal(found["scale"], start.scale)


@pytest.mark.parametrize(
    ("state", "group_size", "bad"),
    [("8bit", -1, float("nan")), ("8bit", 9, float("inf")), ("fp32", 0, float("inf")), ("fp32", 9, float("nan"))],
)
def test_a_gradient_that_is_not_finite_poisons_the_scale(state, group_size, bad):
    start = kernel_weight(3, group_size, (6, 45))
    (grad,) = gradients((6, 45), 1)
    grad[4, 30] = bad
    found, expected = (
        trained(kernels, start, [grad], lr=0.01, state=state, error_feedback=False) for kernels in (True, False)
    )
    assert found["scale"].isnan().all()
    assert torch.equal(found["packed"], expected["packed"])
    kept = torch.arange(6) != 4
    for name in found.keys() - {"step", "stream", "packed", "scale"}:
        assert torch.equal(found[name][kept], expected[name][kept]), name


def test_what_one_weight_broke_another_does_not_have():
    """Steps one after the other: scales are NaN where the update was not finite, and only there."""
    start = kernel_weight(3, -1, (6, 300))
    finite, broken = gradients((6, 300), 1)[0], torch.full((6, 300), torch.nan, device=DEVICE)
    options = {"lr": 0.01, "state": "8bit", "error_feedback": False}
    assert trained(True, start, [broken], **options)["scale"].isnan().all()
    found = trained(True, start, [finite], **options)
    assert torch.equal(found["scale"], start.scale)
    assert trained(True, start, [finite, broken, finite], **options)["scale"].isnan().all()


@pytest.mark.parametrize("kernels", [True, False])
def test_a_step_counts_as_a_write(kernels: bool):
    """Autograd, and layers that keep a weight, ask torch whether something was written."""
    p = nn.Parameter(kernel_weight(4, -1, (5, 45)))
    inner = p.packed, p.scale, p.stream
    before = [tensor._version for tensor in inner]
    optimizer = LowBitAdamW([p])
    (p.grad,) = gradients((5, 45), 1)
    with use_kernels(kernels):
        optimizer.step()
    assert all(tensor._version > version for tensor, version in zip(inner, before, strict=True))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kernels", [True, False])
def test_norms_of_parts_make_the_norm(kernels: bool, state: str):
    p = nn.Parameter(kernel_weight(4, -1, (6, 300)))
    optimizer = LowBitAdamW([p], state=state)
    (grad,) = gradients((6, 300), 1, torch.bfloat16)
    with use_kernels(kernels):
        norms = optimizer._step_codes(p, grad, optimizer.param_groups[0], norms=True)
    torch.testing.assert_close(torch.linalg.vector_norm(norms), torch.linalg.vector_norm(grad.float()))


def test_random_words_are_those_of_the_reference():
    """Codes that only u decides: moves of half a grid step, from far down a row and far along the stream."""
    shape = (2, 1030)
    start = LowBitTensor.from_codes(torch.zeros(shape, dtype=torch.int8), torch.ones(2, 1), Grid(8, -1), 2**63 - 25)
    start = start.to(DEVICE)
    start.stream[1] = 2**31 + 7
    found = trained(True, start, [torch.full(shape, -1.0, device=DEVICE)], lr=0.5, state="fp32", eps=0.0)
    after = LowBitTensor(found["packed"], start.scale, start.stream, start.grid, shape[1]).codes()
    words = random_words(torch.arange(2, device=DEVICE), shape[1], start.stream[1], start.stream[0])
    # the corrections of the first step leave the move within a rounding of 0.5; no word lies so close to the edge
    assert torch.equal(after == 1, words >= 2**31)
    assert 0.4 < after.float().mean() < 0.6
