"""A learning rate that would take a pretrained model apart is said, once for an optimizer, with its numbers."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from peft_lrqat import LowBitAdamW
from tests.lowbit_sr import layers
from tests.models import low_bit, tiny, tokens

SAID = "The learning rate of low-bit weights is far above what fine-tuning takes"
SIZE = 0.1  # of the weights of tiny()


def pretrained(name: str = "someone/model", **options) -> torch.nn.Module:
    model = tiny()
    model.name_or_path = name
    return low_bit(model, **options).train()


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: LambdaLR | None = None) -> None:
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if schedule is not None:
        schedule.step()


def trained(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, LowBitAdamW])
def test_the_rates_of_lr_qat_are_too_high(kind: Callable, bits: int):
    model = pretrained(bits=bits)
    optimizer = kind(trained(model), lr=5e-3)
    with pytest.warns(UserWarning, match=SAID) as found:
        step(model, optimizer)
    (message,) = [str(w.message) for w in found if SAID in str(w.message)]
    weight = next(iter(layers(model).values())).lowbitsr_weight["default"].weight
    share, steps = (float(x) for x in re.findall(r"which is ([\d.e+-]+) % .* and ([\d.e+-]+) steps", message)[0])
    assert share == pytest.approx(100 * 5e-3 / SIZE, rel=0.2)
    assert steps == pytest.approx(5e-3 / float(weight.scale.abs().median()), rel=0.3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=SAID)
        step(model, optimizer)  # said once


def test_the_highest_rate_of_a_schedule_counts():
    model = pretrained()
    optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
    schedule = LambdaLR(optimizer, lambda number: number / 100)  # warms up from 0
    with pytest.warns(UserWarning, match=SAID):
        step(model, optimizer, schedule)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-4),
        lambda p: torch.optim.SGD(p, lr=0.1),  # times the gradient
        lambda p: LowBitAdamW(p, lr=0.05, lr_unit="grid"),
        lambda p: LowBitAdamW(p, lr=3e-5, fused_backward=True),
    ],
)
def test_other_rates_are_left_alone(make: Callable):
    model = pretrained(bits=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=SAID)
        step(model, make(trained(model)))


def test_from_scratch_such_rates_are_usual():
    model = pretrained(name="")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=SAID)
        step(model, torch.optim.AdamW(trained(model), lr=1e-2))


def test_ternary_weights_begin_anew_and_want_such_rates():
    model = pretrained(bits=1.58)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=SAID)
        step(model, LowBitAdamW(trained(model), lr=5e-3))


def test_copies_of_a_weight_know_it_too():
    weight = next(iter(layers(pretrained()).values())).lowbitsr_weight["default"].weight
    for copied in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.detach().to("meta")):
        assert copied.fine_tunes
