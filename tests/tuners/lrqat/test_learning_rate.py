"""A learning rate at which hardly any weight becomes another integer is said at the first step."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.optim import optimizer as torch_optimizer
from torch.optim.lr_scheduler import LambdaLR

from tests.lrqat import config, layers
from tests.models import tiny, tokens

SAID = "The learning rate of LR-QAT's adapters is"


def adapt(**options) -> PeftModel:
    return get_peft_model(tiny(), config(**{"r": 32, **options})).train()


def step(model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()


def optimizer(model: PeftModel, lr: float, kind=torch.optim.AdamW) -> torch.optim.Optimizer:
    return kind([p for p in model.parameters() if p.requires_grad], lr=lr)


def test_the_number_of_updates_is_what_it_takes():
    model = adapt()
    lr, layer = 1e-6, next(iter(layers(model).values()))
    with pytest.warns(UserWarning, match=SAID) as found:
        step(model, optimizer(model, lr))
    (said,) = [str(w.message) for w in found if SAID in str(w.message)]
    updates = float(re.findall(r"about (\d+) updates", said)[0])
    moved = layer.get_delta_weight("default").square().mean().sqrt()  # of one update, from lora_B = 0
    assert updates == pytest.approx(0.5 / float(moved), rel=0.25)


def test_a_strength_stands_in_for_a_rate():
    for lr, alpha, said in (
        (1e-3, None, False),
        (1e-4, None, False),
        (1e-6, None, True),
        (1e-6, 16 * 32 * 1000, False),
    ):
        model = adapt(lora_alpha=alpha)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step(model, optimizer(model, lr))
        assert any(SAID in str(w.message) for w in found) == said


def test_scales_alone_that_hardly_move():
    for lr, said in ((1e-3, False), (1e-4, False), (2e-5, True)):  # TRL's default
        model = adapt(r=0)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step(model, optimizer(model, lr))
        messages = [str(w.message) for w in found if "The learning rate of LR-QAT's scales is" in str(w.message)]
        assert len(messages) == said
        if said:
            assert "about 500 updates" in messages[0]
            moved = [layer.lora_scale_shift["default"].weight.detach().abs().max() for layer in layers(model).values()]
            assert max(moved) == pytest.approx(lr, rel=0.01)


@pytest.mark.parametrize("r", [0, 32])
def test_a_model_in_bf16_whose_adapter_peft_casts(r):
    """PEFT puts new parameters into the adapter's modules where it casts them to fp32."""
    model = get_peft_model(tiny().to(torch.bfloat16), config(r=r)).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with pytest.warns(UserWarning, match="The learning rate of LR-QAT's (adapters|scales) is"):
        step(model, optimizer(model, 1e-6))


def test_other_rules_and_warming_up():
    for kind, lr in ((torch.optim.SGD, 1e-6), (torch.optim.AdamW, 1e-3), (torch.optim.AdamW, 0.0)):
        model = adapt()
        own = optimizer(model, lr, kind)
        LambdaLR(own, lambda number: number / 100)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=SAID)
            step(model, own)


def test_other_hooks_of_optimizers_may_stand_beside_it():
    """torch runs over the hooks while they are called: none may come or go then."""
    seen = []
    adapt()  # the hook is there
    other = torch_optimizer.register_optimizer_step_pre_hook(lambda *args: seen.append(1))
    try:
        model = adapt()
        step(model, optimizer(model, 1e-3))
        before = len(torch_optimizer._global_optimizer_pre_hooks)
        model = adapt()
        step(model, optimizer(model, 1e-3))
        assert len(torch_optimizer._global_optimizer_pre_hooks) == before
    finally:
        other.remove()
    assert seen == [1, 1]
