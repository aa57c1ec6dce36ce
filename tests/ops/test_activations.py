import pytest
import torch

from peft_lrqat.ops.activations import round_activations

WIDTH = 45


@pytest.mark.parametrize(("rule", "levels"), [("bitnet", 127), ("compressed-tensors", 127.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_lie_on_each_tokens_grid(rule: str, levels: float, dtype: torch.dtype):
    x = (torch.randn(2, 5, WIDTH) * torch.tensor([0.01, 1, 300, 1, 0]).view(1, 5, 1)).to(dtype).requires_grad_()
    y = round_activations(x, rule)
    assert y.dtype == dtype
    step = x.detach().float().abs().amax(dim=-1, keepdim=True) / levels
    exact = torch.finfo(dtype).eps * 300
    assert ((y - x).float().abs() <= step * (0.5 + exact)).all()
    assert (y[:, 4] == 0).all()
    assert len((y[0, 1].detach().float() / step[0, 1]).round().unique()) > WIDTH / 2
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert (gradient == 1).all()  # straight through


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="allowed are 'compressed-tensors', 'bitnet'"):
        round_activations(torch.ones(2, 3), "int8")
