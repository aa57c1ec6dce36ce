"""Which weights `LowBitAdamW` gives latent weights, and with which of them a loaded state goes on."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from peft_lrqat import LowBitAdamW
from tests import low_bit_weights


@pytest.mark.parametrize("feedback", [None, True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_latent_weights_are_the_default_of_ternary_weights_alone(feedback: bool | None, fused: bool):
    grads = torch.randn(2, 5, 300)
    start = {bits: low_bit_weights.weight(bits, -1, (5, 300)) for bits in (1.58, 2, 3, 4, 8)}

    def train(*bits: float, **options) -> list[dict]:
        held = [nn.Parameter(start[b].clone()) for b in bits]
        optimizer = LowBitAdamW(held, lr=1e-2, error_feedback=feedback, fused_backward=fused, **options)
        for grad in grads:
            torch.stack([(p * grad).sum() for p in held]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        tensors = ({k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)} for p in held)
        return [{**state, "codes": p.codes(), "scale": p.scale} for state, p in zip(tensors, held, strict=True)]

    ternary, *finer = train(*start)  # one optimizer for all widths
    assert not any("latent_codes" in state for state in finer)
    (alone,) = train(1.58, latent_weights=True)
    assert alone.keys() == ternary.keys() >= {"latent_codes", "latent_start"}
    assert all(torch.equal(alone[name], ternary[name]) for name in alone)
    assert "latent_codes" not in train(1.58, latent_weights=False)[0]


def test_a_state_from_before_latent_weights_goes_on_without_them():
    p = nn.Parameter(low_bit_weights.weight(1.58, -1, (5, 300)))
    optimizer = LowBitAdamW([p], latent_weights=False)
    p.grad = torch.randn(5, 300)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["latent_weights"]
    twin = copy.deepcopy(p)
    LowBitAdamW([twin], latent_weights=False).load_state_dict(saved)  # whoever knows is not told
    second = LowBitAdamW([twin])
    with pytest.warns(UserWarning, match="saved without latent weights, and 1 weights go on without them"):
        second.load_state_dict(saved)
    twin.grad = p.grad.clone()
    for one in (optimizer, second):
        one.step()
    assert "latent_codes" not in second.state[twin]
    assert torch.equal(twin.codes(), p.codes())
    second.param_groups[0]["latent_weights"] = True  # whoever wants them says so again
    second.step()
    assert second.state[twin]["latent_codes"].dtype == torch.int8


@pytest.mark.parametrize(
    ("bits", "saved", "asked"),
    [((1.58, 8), False, None), ((1.58, 2), True, None), ((1.58, 2), True, False), ((1.58, 8), None, False)],
)
def test_what_the_warning_of_loaded_latent_weights_advises_works(bits, saved: bool | None, asked: bool | None):
    held = [nn.Parameter(low_bit_weights.weight(b, -1, (5, 300))) for b in bits]

    def step(optimizer: LowBitAdamW) -> list[bool]:
        for p in held:
            p.grad = torch.randn(5, 300)
        optimizer.step()
        return ["latent_codes" in optimizer.state[p] for p in held]

    first = LowBitAdamW(held, latent_weights=saved)
    before = step(first)
    state = copy.deepcopy(first.state_dict())
    second = LowBitAdamW(held, latent_weights=asked)
    word = "without" if saved is False else "with"
    match = f"saved {word} latent weights.* to {asked} after loading.*`latent_weights={saved}`"
    with pytest.warns(UserWarning, match=match) as told:
        second.load_state_dict(state)
    assert len(told) == 1
    assert step(second) == before
    second.param_groups[0]["latent_weights"] = asked
    assert step(second) == step(LowBitAdamW(held, latent_weights=asked))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LowBitAdamW(held, latent_weights=saved).load_state_dict(state)


def test_latent_weights_that_one_group_loses_and_another_gains_are_both_told():
    held = [nn.Parameter(low_bit_weights.weight(b, -1, (5, 300))) for b in (1.58, 4)]
    options = ({"latent_weights": False}, {"latent_weights": True})
    saved = LowBitAdamW([{"params": [p], **own} for p, own in zip(held, options, strict=True)]).state_dict()
    with pytest.warns(UserWarning, match="latent weights") as told:
        LowBitAdamW([{"params": [p]} for p in held]).load_state_dict(saved)
    assert [str(one.message).split(" latent")[0].split()[-1] for one in told] == ["without", "with"]


@pytest.mark.parametrize(("group_size", "scales"), [(-1, 0.001), (128, 0.031), (0, 0.0)])
@pytest.mark.parametrize(("state", "total"), [("8bit", 3.02), ("factored", 2.02)])
def test_state_with_latent_weights_takes_the_bytes_it_promises(
    group_size: int, scales: float, state: str, total: float
):
    p = nn.Parameter(low_bit_weights.weight(1.58, group_size, (1024, 4096)))
    optimizer = LowBitAdamW([p], state=state)
    p.grad = torch.randn(p.shape)
    optimizer.step()
    held = sum(value.nbytes for value in optimizer.state[p].values() if isinstance(value, torch.Tensor))
    assert held / p.numel() == pytest.approx(total + scales, abs=0.005)
