"""Layers that share an input share its rounding, and no two that might differ do."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_lrqat.ops import shared_inputs
from peft_lrqat.ops.activations import Activations, round_activations, rounded_values
from peft_lrqat.ops.shared_inputs import round_shared, shared_values
from tests.models import adapted, low_bit, tiny, tokens

HOW = Activations("vllm")
Q, K, V = (torch.nn.Linear(8, 4) for _ in range(3))


@pytest.fixture
def roundings(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of all that is rounded."""
    shapes: list[torch.Size] = []

    def counted(x: torch.Tensor, activations: Activations) -> torch.Tensor:
        shapes.append(x.shape)
        return rounded_values(x, activations)

    monkeypatch.setattr(shared_inputs, "rounded_values", counted)
    return shapes


def test_layers_with_one_input_round_it_once(roundings: list):
    x = torch.randn(2, 3, 8, requires_grad=True)
    found = [round_shared(x, HOW, layer) for layer in (Q, K, V)]
    assert len(roundings) == 1
    expected = round_activations(x.detach(), HOW)
    for y in found:  # each with a gradient of its own
        assert torch.equal(y, expected)
        assert torch.equal(torch.autograd.grad(y, x, 2 * torch.ones_like(y))[0], torch.full_like(y, 2))
    with torch.no_grad():
        assert not round_shared(x, HOW, torch.nn.Linear(8, 4)).requires_grad
    assert len(roundings) == 1


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _write(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x.mul_(2)
    return x


def _write_to_a_view(x: torch.Tensor) -> torch.Tensor:
    x.detach()[0].zero_()
    return x


def _other_memory(x: torch.Tensor) -> torch.Tensor:
    x.data = torch.ones_like(x)
    return x


def _other_order(x: torch.Tensor) -> torch.Tensor:
    x.data = x.data.transpose(0, 1)
    return x


CHANGES = [_write, _write_to_a_view, _other_memory, _other_order, torch.clone, torch.detach]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_another_input_is_rounded_anew(change: Callable, roundings: list):
    x = torch.randn(3, 3, 8)
    shared_values(x, HOW, Q)
    changed = change(x)
    assert torch.equal(shared_values(changed, HOW, K), rounded_values(changed, HOW))
    assert len(roundings) == 2


def test_another_rule_a_layer_that_asks_again_and_changed_numbers_are_rounded_anew(roundings: list):
    x = torch.randn(2, 3, 8)
    shared_values(x, HOW, Q)
    four = shared_values(x, Activations("vllm", 4), K)
    assert torch.equal(four, rounded_values(x, Activations("vllm", 4)))
    x.data.mul_(3)  # of which no version tells
    assert torch.equal(shared_values(x, Activations("vllm", 4), K), rounded_values(x, Activations("vllm", 4)))
    shared_values(x, HOW, Q).zero_()
    assert torch.equal(shared_values(x, HOW, K), rounded_values(x, HOW))
    assert len(roundings) == 5


def test_an_input_that_autocast_casts_is_cast_and_rounded_once(roundings: list):
    x = torch.randn(2, 3, 8, requires_grad=True)
    expected = round_activations(x.bfloat16(), HOW)
    with torch.autocast("cpu", torch.bfloat16):
        found = [round_shared(x, HOW, layer) for layer in (Q, K)]
    assert len(roundings) == 1
    for y in found:
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert gradient.dtype == torch.float32
    assert torch.equal(round_shared(x, HOW, V), round_activations(x, HOW))  # as floats, in which they are others


def test_other_threads_and_who_watches_operations_see_a_rounding_of_their_own(roundings: list):
    x = torch.randn(2, 3, 8)
    shared_values(x, HOW, Q)
    thread = threading.Thread(target=shared_values, args=(x, HOW, K))
    thread.start()
    thread.join()
    with _Watching():
        shared_values(x, HOW, K)
    assert len(roundings) == 3
    with torch.inference_mode():  # tensors without versions
        x = torch.randn(2, 3, 8)
        for layer in (Q, K):
            shared_values(x, HOW, layer)
    assert len(roundings) == 5


def test_inference_mode_with_an_input_from_outside():
    x = torch.randn(2, 3, 8, requires_grad=True)
    with torch.inference_mode():
        inside = [shared_values(x, HOW, layer) for layer in (Q, K)]
    y = round_shared(x, HOW, V)  # which autograd could not keep, had it been made in there
    assert all(torch.equal(values, y) for values in inside)
    y.square().sum().backward()
    assert torch.equal(x.grad, 2 * y)


def test_derivatives_that_cannot_be_taken_are_refused():
    x = torch.randn(2, 3, 8)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        round_shared(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), HOW, Q)
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match="functorch transforms"):
            transform(lambda x: round_shared(x, HOW, Q).sum())(x)


def test_nothing_is_kept_longer_than_the_input():
    x = torch.randn(2, 3, 8, requires_grad=True)
    kept = shared_inputs.weakref.ref(shared_values(x, HOW, Q))
    gc.collect()
    assert kept() is not None
    del x
    assert kept() is None
    x, other = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    kept = shared_inputs.weakref.ref(shared_values(x, HOW, Q))
    shared_values(other, HOW, Q)
    assert kept() is None


def test_what_is_traced_rounds_what_it_is_given():
    def run(x: torch.Tensor) -> torch.Tensor:
        return round_shared(x, HOW, Q) + round_shared(x, HOW, K)

    x, other = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    for recorded in (torch.jit.trace(run, (x,)), torch.compile(run, backend="aot_eager", fullgraph=True)):
        assert torch.equal(recorded(other), run(other))


@pytest.mark.parametrize(
    ("method", "checkpointing"), [("lrqat", None), ("lrqat", False), ("lrqat", True), ("lowbit_sr", False)]
)
def test_a_block_rounds_four_inputs_and_trains_as_if_it_rounded_seven(
    method: str, checkpointing: bool | None, roundings: list, monkeypatch: pytest.MonkeyPatch
):
    model = (adapted if method == "lrqat" else low_bit)(tiny("llama"), act_bits=8, act_rule="vllm").train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bool(checkpointing))
    blocks, passes = model.config.num_hidden_layers, 1 if checkpointing is None else 2

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        with autocast:
            out = model(input_ids=tokens(), labels=tokens())
        out.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients
        return [out.logits, *gradients]

    shared = step()
    assert len(roundings) == 4 * blocks * passes
    monkeypatch.setattr(shared_inputs, "_place", lambda x: None)
    for found, expected in zip(shared, step(), strict=True):
        assert torch.equal(found, expected)
    assert len(roundings) == 11 * blocks * passes
