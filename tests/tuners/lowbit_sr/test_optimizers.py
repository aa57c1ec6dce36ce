"""Any torch optimizer trains low-bit weights without knowing them: it moves codes, without bias, and never silently."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor as HFAdafactor

from peft_lrqat import LowBitAdamW
from peft_lrqat.grid import Grid
from peft_lrqat.tuners.lowbit_sr import LowBitTensor
from tests.models import low_bit, tiny, tokens

BITS = (1.58, 2, 3, 4, 8)
IDS = tokens()


class Lion(Optimizer):
    """Lion (arXiv 2302.06675) as third parties write it: in place, on `p.data`."""

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.data.mul_(1 - group["lr"] * group["weight_decay"])
                update = m.clone().mul_(group["betas"][0]).add_(p.grad, alpha=1 - group["betas"][0]).sign_()
                p.data.add_(update, alpha=-group["lr"])
                m.lerp_(p.grad, 1 - group["betas"][1])


def torchao(name: str) -> Callable[..., Optimizer]:
    def make(params, **options):
        module = pytest.importorskip("torchao.optim")
        return getattr(module, name)(params, **options)

    return make


def bitsandbytes(name: str) -> Callable[..., Optimizer]:
    def make(params, **options):
        return getattr(pytest.importorskip("bitsandbytes").optim, name)(params, **options, min_8bit_size=64)

    return make


def muon(params, **options):
    matrices = [p for p in params if p.ndim == 2]
    return torch.optim.Muon(matrices, **options)


OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW-decay": (torch.optim.AdamW, {"weight_decay": 0.5}),
    "AdamW-fused": (torch.optim.AdamW, {"fused": True}),  # the Trainer's default
    "AdamW-foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW-loop": (torch.optim.AdamW, {"foreach": False}),
    "AdamW-amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "SGD": (torch.optim.SGD, {"lr": 1.0}),
    "SGD-foreach": (torch.optim.SGD, {"lr": 1.0, "foreach": True}),
    "SGD-fused": (torch.optim.SGD, {"lr": 1.0, "momentum": 0.9, "fused": True}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "Adafactor-transformers": (HFAdafactor, {"relative_step": False, "scale_parameter": False}),
    "Muon": (muon, {}),
    "Lion": (Lion, {"weight_decay": 0.1}),
    "LowBitAdamW": (LowBitAdamW, {}),
    "torchao-AdamW8bit": (torchao("AdamW8bit"), {}),
    "torchao-AdamW4bit": (torchao("AdamW4bit"), {}),
    "bnb-AdamW8bit": (bitsandbytes("AdamW8bit"), {}),
    "bnb-Lion8bit": (bitsandbytes("Lion8bit"), {}),
}


@pytest.fixture(autouse=True)
def eager_torchao(monkeypatch: pytest.MonkeyPatch):
    """torchao compiles its step for every shape, which takes longer than all other tests."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def weights(model: nn.Module) -> dict[str, LowBitTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, LowBitTensor)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains(name: str):
    make, options = OPTIMIZERS[name]
    model = low_bit(tiny(num_hidden_layers=1), bits=8).train()
    before = {key: p.codes() for key, p in weights(model).items()}
    frozen = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
    optimizer = make([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-2, **options})
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses
    for key, p in weights(model).items():
        assert not torch.equal(p.codes(), before[key]), key
    assert all(torch.equal(dict(model.named_parameters())[key], value) for key, value in frozen.items())
    # afterwards the optimizer is as if it had always held the low-bit parameters
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert list(map(id, held)) == list(map(id, weights(model).values()))
    assert {id(key) for key in optimizer.state} <= set(map(id, held))
    assert optimizer.state_dict()["param_groups"][0]["params"] == list(range(len(held)))


@pytest.mark.parametrize(
    ("name", "bits"),
    [*((name, bits) for name in ("AdamW-fused", "LowBitAdamW") for bits in BITS), *((name, 3) for name in OPTIMIZERS)],
)
def test_a_learning_rate_of_zero_changes_not_one_code(name: str, bits: float):
    make, options = OPTIMIZERS[name]
    model = low_bit(tiny(num_hidden_layers=1), bits=bits, group_size=8)
    trained = weights(model)
    before = {key: p.codes() for key, p in trained.items()}
    optimizer = make(list(trained.values()), **{**options, "lr": 0.0})
    for _ in range(5):
        for p in trained.values():
            p.grad = torch.randn(p.shape)
        optimizer.step()
    assert all(torch.equal(p.codes(), before[key]) for key, p in trained.items())


@pytest.mark.parametrize("name", ["AdamW-decay", "AdamW-fused", "SGD-fused", "Adafactor", "Muon", "Lion"])
def test_a_step_is_the_optimizers_own_step_rounded_once(name: str):
    make, options = OPTIMIZERS[name]
    scale = torch.rand(64, 1) * 0.01 + 0.01
    p = nn.Parameter(LowBitTensor.from_codes(torch.randint(-50, 50, (64, 96), dtype=torch.int8), scale, Grid(8), 3))
    twin = nn.Parameter(p.to_float())
    p.grad = torch.randn(64, 96)
    twin.grad = p.grad.clone()
    make([p], **{**options, "lr": 1e-2}).step()
    make([twin], **{**options, "lr": 1e-2}).step()
    missed = (p.to_float() - twin.detach()) / scale
    assert missed.abs().max() < 1 + 1e-3  # one rounding, up or down
    assert missed.abs().max() > 0.5
    assert abs(missed.mean()) < 5 * missed.std() / missed.numel() ** 0.5


def updates(name: str, p: LowBitTensor) -> Callable[[float], None]:
    """A function that makes an optimizer subtract so many grid steps from every weight."""
    if name == "SGD":
        optimizer: Optimizer = torch.optim.SGD([p], lr=0.0)
    else:  # a constant gradient makes a full step of AdamW; betas[1] = 0: the noise of 8-bit state is not the subject
        optimizer = LowBitAdamW([p], lr=0.0, betas=(0.9, 0.0), state=name, lr_unit="grid", eps=1e-12)

    def update(steps: float) -> None:
        optimizer.param_groups[0]["lr"] = steps * (float(p.scale) / 1e-3 if name == "SGD" else 1)
        p.grad = torch.full(p.shape, 1e-3)
        optimizer.step()

    return update


@pytest.mark.parametrize(
    ("bits", "name"), [*((bits, "SGD") for bits in BITS), (2, "8bit"), (8, "8bit"), (3, "factored"), (8, "fp32")]
)
def test_small_updates_are_unbiased(bits: float, name: str):
    """200 updates of 0.02 grid steps move a weight by 4.0 steps on average, from and to every level."""
    grid = Grid(bits, 0)
    start = torch.full((64, 128), grid.qmin + 1, dtype=torch.int8)
    p = nn.Parameter(LowBitTensor.from_codes(start, torch.full((1, 1), 0.013), grid, key=11))
    update = updates(name, p)
    moved, again = torch.zeros(64, 128), p.packed.clone()
    for _ in range(200):
        update(-0.02)
        moved += p.codes() - start
        p.packed.copy_(again)  # so that no weight reaches the end of a narrow grid
    sampling_error = (200 * 0.02 * 0.98 / moved.numel()) ** 0.5
    assert abs(moved.mean() - 4.0) < 5 * sampling_error
    assert abs(moved.var() - 200 * 0.02 * 0.98) < 0.2

    if bits == 8:  # and without coming back in between
        for _ in range(200):
            update(-0.02)
        assert abs((p.codes() - start).float().mean() - 4.0) < 5 * sampling_error


def test_a_bf16_copy_would_be_biased():
    """The same updates through a bf16 weight: what the fp32 arithmetic inside is for."""
    value = torch.full((1000,), 100 * 0.013, dtype=torch.bfloat16)
    for _ in range(200):
        value += 0.02 * 0.013
    assert (value.float() / 0.013 - 100).mean() < 1


def test_optimizer_state_is_saved_and_goes_on_bit_for_bit():
    def run(steps: int, model, optimizer):
        for _ in range(steps):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def make():
        model = low_bit(tiny(num_hidden_layers=1), bits=4).train()
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)

    whole, optimizer = make()
    run(2, whole, optimizer)
    model_state, optimizer_state = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    other, second = make()
    other.load_state_dict(model_state)
    second.load_state_dict(optimizer_state)
    run(3, whole, optimizer)
    run(3, other, second)
    found = weights(other)
    assert all(torch.equal(p.codes(), found[key].codes()) for key, p in weights(whole).items())


def test_a_step_that_fails_leaves_the_optimizer_usable():
    model = low_bit(tiny(num_hidden_layers=1), bits=4)
    trained = list(weights(model).values())

    class Fails(torch.optim.SGD):
        fail = True

        def step(self, closure=None):
            if self.fail:
                raise RuntimeError("out of memory, say")
            return super().step()

    optimizer = Fails(trained, lr=1.0)
    before = [p.codes() for p in trained]
    for p in trained:
        p.grad = torch.randn(p.shape)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert all(torch.equal(p.codes(), codes) for p, codes in zip(trained, before, strict=True))
    optimizer.fail = False
    optimizer.step()
    assert optimizer.param_groups[0]["params"] == trained
    assert not any(torch.equal(p.codes(), codes) for p, codes in zip(trained, before, strict=True))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["LBFGS", "SGD"])
def test_closures_are_refused(kind: str, first: bool):
    p = next(iter(weights(low_bit(tiny(num_hidden_layers=1))).values()))
    p.grad = None if first else torch.randn(p.shape)
    optimizer = getattr(torch.optim, kind)([p], lr=0.1)
    before = p.codes()
    with pytest.raises(ValueError, match=r"given a closure.*LowBitAdamW"):
        optimizer.step(lambda: torch.zeros(()))
    assert torch.equal(p.codes(), before)


def test_error_feedback_is_refused_where_nobody_would_feed_back():
    p = next(iter(weights(low_bit(tiny(num_hidden_layers=1), error_feedback=True)).values()))
    p.grad = torch.randn(p.shape)
    with pytest.raises(ValueError, match=r"`error_feedback=True`.*AdamW knows nothing about.*LowBitAdamW"):
        torch.optim.AdamW([p]).step()
    LowBitAdamW([p]).step()


def test_what_is_no_torch_optimizer_is_told():
    p = next(iter(weights(low_bit(tiny(num_hidden_layers=1))).values()))
    p.grad = torch.randn(p.shape)
    with pytest.raises(RuntimeError, match=r"low-bit weight in place.*torch.optim.Optimizer"), torch.no_grad():
        p.data.add_(p.grad, alpha=-0.1)
