"""The hooks by which any optimizer trains packed codes come with the first low-bit weight, however it comes."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import pytest
import torch

from peft_lrqat import Grid, LowBitAdamW
from peft_lrqat.tuners.lowbit_sr import LowBitTensor
from tests.models import low_bit, tiny
from tests.processes import run

_COUNT = """
import pickle, sys, torch
from torch.optim import optimizer
import peft_lrqat
from peft_lrqat import LRQATConfig
from peft import get_peft_model
count = lambda: (len(optimizer._global_optimizer_pre_hooks), len(optimizer._global_optimizer_post_hooks))
get_peft_model(torch.nn.ModuleList([torch.nn.Linear(8, 8)]), LRQATConfig(group_size=-1, target_modules=["0"]))
own = count()  # the package's look at what is trained, and LR-QAT's at the learning rate, once each
assert own == (2, 0), own
"""

_LAYER = """
from peft_lrqat import LowBitSRConfig
get_peft_model(torch.nn.ModuleList([torch.nn.Linear(8, 8)]), LowBitSRConfig(target_modules=["0"]))
assert count() == (3, 1), count()
get_peft_model(torch.nn.ModuleList([torch.nn.Linear(8, 8)]), LowBitSRConfig(target_modules=["0"]))
assert count() == (3, 1), count()
"""

_PICKLE = """
p = pickle.load(open(sys.argv[1], "rb"))
assert count() == (3, 1), count()
p.grad = torch.ones(4, 8)
before = p.codes()
torch.optim.SGD([p], lr=3.0).step()
assert not torch.equal(p.codes(), before)
"""


@pytest.mark.parametrize("code", [_LAYER, _PICKLE], ids=["a layer", "a pickle"])
def test_hooks_come_with_the_first_weight(code: str, tmp_path: Path):
    codes = torch.zeros(4, 8, dtype=torch.int8)
    weight = torch.nn.Parameter(LowBitTensor.from_codes(codes, torch.ones(4, 1), Grid(8, -1), key=1))
    (tmp_path / "weight.pkl").write_bytes(pickle.dumps(weight))
    run(_COUNT + code, str(tmp_path / "weight.pkl"))


@pytest.mark.parametrize("bits", [1.58, 4])
def test_ternary_weights_name_the_optimizer_that_trains_them_better(bits: float):
    model = low_bit(tiny(), bits=bits)
    weights = [p for p in model.parameters() if isinstance(p, LowBitTensor)]
    torch_s, ours = torch.optim.AdamW(weights, lr=1e-3), LowBitAdamW(weights, lr=1e-3)
    said = []
    for optimizer in (ours, torch_s, torch_s):
        for weight in weights:
            weight.grad = torch.ones(weight.shape)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said.append(sum("LowBitAdamW gives them latent weights" in str(one.message) for one in caught))
    assert said == [0, bits == 1.58, 0]


class Wrapper(torch.optim.Optimizer):
    """Hands its step on."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


@pytest.mark.parametrize("bits", [1.58, 4])
@pytest.mark.parametrize("kind", [LowBitAdamW, torch.optim.AdamW])
@pytest.mark.filterwarnings("ignore:AdamW trains ternary weights")
def test_a_wrapper_leaves_the_weights_to_the_optimizer_within(kind: type[torch.optim.Optimizer], bits: float):
    """Whose step it is, error feedback and latent weights included, and who keeps the state."""
    found = []
    for wrap in (Wrapper, lambda inner: inner):
        model = low_bit(tiny(num_hidden_layers=1), bits=bits)
        weights = [p for p in model.parameters() if isinstance(p, LowBitTensor)]
        inner = kind(weights, lr=1e-2)
        optimizer = wrap(inner)
        torch.manual_seed(0)
        for _ in range(4):
            for weight in weights:
                weight.grad = torch.randn(weight.shape)
            optimizer.step()
        assert {*inner.state} == {*weights}
        found.append([weight.packed for weight in weights])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class _ScheduleFree(torch.optim.SGD):
    """Trains at one point, and evaluates at another."""

    def eval(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.lerp_(torch.zeros(parameter.shape), 0.5)


def test_what_changes_weights_between_steps_is_refused_in_the_first():
    parameter = next(p for p in low_bit(tiny(num_hidden_layers=1)).parameters() if isinstance(p, LowBitTensor))
    parameter.grad = torch.randn(parameter.shape)
    before = parameter.codes()
    with pytest.raises(ValueError, match=r"_ScheduleFree has an `eval\(\)`.*LowBitAdamW, torch\.optim\.AdamW"):
        _ScheduleFree([parameter], lr=0.1).step()
    assert torch.equal(parameter.codes(), before)
    plain = torch.nn.Parameter(torch.ones(3))
    plain.grad = torch.ones(3)
    _ScheduleFree([plain], lr=0.1).step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, LowBitAdamW])
def test_a_compiled_step_is_the_step(kind: type[torch.optim.Optimizer]):
    """As torch's recipe for compiled optimizers has it: torch could not trace the packed codes."""
    torch._dynamo.reset()
    weights = [
        [p for p in low_bit(tiny(num_hidden_layers=1)).parameters() if isinstance(p, LowBitTensor)] for _ in range(2)
    ]
    for parameters, compiled in zip(weights, (False, True), strict=True):
        optimizer = kind(parameters, lr=0.01)
        step = torch.compile(lambda step=optimizer.step: step(), backend="aot_eager") if compiled else optimizer.step
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            step()
    assert all(int(p.stream[1]) == 3 for p in weights[1])
    assert all(torch.equal(a.packed, b.packed) for a, b in zip(*weights, strict=True))
