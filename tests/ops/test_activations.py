"""Inputs on a grid: their levels, the straight-through gradient, and inputs that transformers would round otherwise."""

import pytest
import torch

from peft_lrqat.ops.activations import Activations, round_activations
from peft_lrqat.ops.reference_inputs import ACTIVATION_RULES

WIDTH = 45


def tokens(dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(2, 5, WIDTH) * torch.tensor([0.01, 1, 300, 1, 0]).view(1, 5, 1)).to(dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rule", ACTIVATION_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_lie_on_each_tokens_grid(rule: str, dtype: torch.dtype, bits: int):
    x, how = tokens(dtype).requires_grad_(), Activations(rule, bits)
    assert how.steps == 2 ** (bits - 1) - (0.5 if rule == "compressed-tensors" else 1)
    y = round_activations(x, how)
    assert y.dtype == dtype
    step = x.detach().float().abs().amax(dim=-1, keepdim=True) / how.steps
    exact = torch.finfo(dtype).eps * 300
    assert ((y - x).float().abs() <= step * (0.5 + exact)).all()
    assert (y[:, 4] == 0).all()
    assert len((y[0, 1].detach().float() / step[0, 1]).round().unique()) > min(WIDTH / 2, 8)
    with torch.no_grad():
        assert torch.equal(round_activations(x, how), y)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert (gradient == 1).all()  # straight through


def test_inputs_of_which_transformers_takes_several_tokens_together_are_refused():
    for shape in ((3, WIDTH), (1, 2, 3, WIDTH)):
        with pytest.raises(ValueError, match=r"rounds all tokens with one scale.*act_rule='vllm'"):
            round_activations(torch.ones(shape), Activations("compressed-tensors"))
        for how in (Activations("vllm"), Activations("compressed-tensors", group_size=9)):
            assert round_activations(torch.ones(shape), how).shape == shape


def test_compiled():
    x, how = tokens(torch.float32).requires_grad_(), Activations("vllm")
    y = torch.compile(lambda x: 2 * round_activations(x, how), backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(y, 2 * round_activations(x, how))
    assert (torch.autograd.grad(y.sum(), x)[0] == 2).all()


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="allowed are 'compressed-tensors', 'bitnet'"):
        Activations("int8")
