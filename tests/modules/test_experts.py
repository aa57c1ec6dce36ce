"""Experts as modules compute what transformers' module computes, and keep no weights for backward."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_lrqat.modules.architecture import expert_parts
from peft_lrqat.modules.experts import Built, Experts, ExpertStack, Grouped, is_stacked, projections
from tests.mixtures import EXPERTS, FIRST, mixture

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
MODEL = mixture()
HOW = ("eager", "grouped_mm", "batched_mm")


class Recorded(ExpertStack):
    """Builds new weights in every call, as layers on a grid do, and remembers them."""

    def forward(self, experts: torch.Tensor | None, dtype: torch.dtype) -> Built:  # type: ignore[override]
        listed = torch.arange(self.experts) if experts is None else experts
        weight = self.stacked[listed] * 1
        self.built, self.asked = weakref.ref(weight), experts
        return Built(weight, lambda which: (self.stacked[listed[which]] * 1).detach())


def both(how: str = "grouped_mm") -> tuple[nn.Module, Experts]:
    module: Any = copy.deepcopy(MODEL.get_submodule(FIRST)).requires_grad_()
    module.config._experts_implementation = how
    experts = Experts(module, PARTS)
    for name in PARTS:
        setattr(experts, name, Recorded(module.get_parameter(name)))
    return module, experts


def routed(tokens: int = 9, experts: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, and a choice of two of the last experts for each: the first get no token."""
    torch.manual_seed(1)
    hidden = torch.randn(tokens, 32, requires_grad=True)
    choice = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)]) if tokens else torch.zeros(0, 2).long()
    return hidden, choice + EXPERTS - experts, torch.rand(tokens, 2, requires_grad=True)


def gradients(module: nn.Module, inputs: tuple[torch.Tensor, ...], **how: Any) -> list[torch.Tensor]:
    y = checkpoint(module, *inputs, use_reentrant=False) if how.get("checkpointed") else module(*inputs)
    own = [p.weight if isinstance(p := getattr(module, name), nn.Module) else p for name in PARTS]
    dx, dw, *found = torch.autograd.grad(y.square().sum(), [inputs[0], inputs[2], *own])
    return [y, dx, dw, *(g.view(EXPERTS, -1, g.shape[-1]) for g in found)]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_outputs_and_gradients_are_those_of_transformers(how: str, checkpointed: bool):
    module, experts = both(how)
    inputs = routed()
    expected, found = gradients(module, inputs), gradients(experts, inputs, checkpointed=checkpointed)
    assert all(map(torch.equal, found, expected))
    assert experts.down_proj.asked.tolist() == [2, 3, 4]  # the others were not built
    assert not found[-1][:2].any()
    assert found[-1][2:].any()


class Multiplying(Recorded):
    """Multiplies itself where it may."""

    def grouped(self, dtype: torch.dtype) -> Grouped:
        def product(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.grouped_mm(x, self.stacked.mT, offs=ends)

        return Grouped(product, dtype, self.weight.device)


@pytest.mark.parametrize("how", HOW)
def test_a_layer_may_multiply_itself_in_grouped_products(how: str):
    module, experts = both(how)
    for name in PARTS:
        setattr(experts, name, Multiplying(module.get_parameter(name)))
    inputs = routed()
    assert all(map(torch.equal, gradients(experts, inputs), gradients(module, inputs)))
    assert hasattr(experts.down_proj, "asked") == (how != "grouped_mm")
    weights = experts.down_proj.grouped(torch.float32)
    with pytest.raises(TypeError, match="grouped products only"):
        torch.mm(torch.ones(2, 2), weights)


def test_a_layer_with_a_hook_is_called():
    module, experts = both()
    for name in PARTS:
        setattr(experts, name, Multiplying(module.get_parameter(name)))
    experts.down_proj.register_forward_pre_hook(lambda *ignored: None)
    inputs = routed()
    assert torch.equal(experts(*inputs), module(*inputs))
    assert hasattr(experts.gate_up_proj, "asked")


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
def test_no_weights_are_kept_for_backward(how: str):
    _, experts = both(how)
    y = experts(*routed())
    gc.collect()
    assert all(getattr(experts, name).built() is None for name in PARTS)
    y.sum().backward()


def test_what_is_kept_goes_to_the_hooks_outside():
    """Otherwise a checkpointed layer would keep its activations."""
    _, experts = both()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = experts(*routed())
    assert any(t.shape == (18, 32) for t in kept)
    weights = {tuple(getattr(experts, name).stacked[2:].transpose(1, 2).shape) for name in PARTS}
    assert not weights & {tuple(t.shape) for t in kept}
    y.sum().backward()


def test_a_batch_without_tokens():
    _, experts = both()
    experts(*routed(tokens=0)).sum().backward()
    assert all(not experts.get_submodule(name).weight.grad.any() for name in PARTS)


def test_compiled_it_is_a_break_in_the_graph():
    module, experts = both()
    inputs = routed()
    compiled = torch.compile(lambda *inputs: experts(*inputs) * 2, backend="eager")
    assert torch.equal(compiled(*inputs), module(*inputs) * 2)


def test_copies_compute_the_same():
    module, experts = both()
    for name in PARTS:
        setattr(experts, name, ExpertStack(module.get_parameter(name)))
    inputs = routed()
    for copied in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(copied(*inputs), module(*inputs))
        assert copied.down_proj.weight.data_ptr() != experts.down_proj.weight.data_ptr()


def test_back_to_the_module_of_transformers():
    module, _ = both()
    back = Experts(module, PARTS).original()
    assert type(back) is type(module)
    assert all(torch.equal(p, back.get_parameter(name)) for name, p in module.named_parameters())
    assert torch.equal(back(*routed()), module(*routed()))


def test_what_the_module_says_of_itself_is_still_said():
    module, experts = both()
    assert (experts.num_experts, experts.config, experts.hidden_dim) == (EXPERTS, module.config, module.hidden_dim)
    assert is_stacked(module)
    assert not is_stacked(experts)
    assert projections(module) == list(PARTS)
    assert expert_parts(MODEL, FIRST) == PARTS
    with pytest.raises(AttributeError):
        _ = experts.nothing


def test_autocast_chooses_the_dtype_of_the_weights():
    _, experts = both()
    asked = []
    experts.down_proj.forward = lambda which, dtype: (
        asked.append(dtype) or Recorded.forward(experts.down_proj, which, dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        experts(*routed())
    assert asked == [torch.bfloat16]
