"""Hooks go over to the layer that takes another's place, and their handles still remove them."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from peft_lrqat.modules.carry import carry_hooks


def _old_and_new() -> tuple[nn.Linear, nn.Linear]:
    old, new = nn.Linear(3, 2), nn.Linear(3, 2)
    new.load_state_dict(old.state_dict())
    return old, new


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_hooks_are_called_until_their_handle_removes_them(after: bool):
    (old, new), x, seen = _old_and_new(), torch.randn(4, 3, requires_grad=True), []
    plain = old(x)
    if after:
        carry_hooks(old, new)
    handles = [
        old.register_forward_pre_hook(lambda m, args, kwargs: seen.append("pre"), with_kwargs=True),
        old.register_forward_hook(lambda m, args, kwargs, y: 2 * y, with_kwargs=True, always_call=True),
        old.register_full_backward_pre_hook(lambda m, grads: seen.append("backward pre")),
        old.register_full_backward_hook(lambda m, grads, outputs: seen.append(type(m).__name__)),
    ]
    if not after:
        carry_hooks(old.eval(), new)
        assert not new.training
    assert torch.equal(new(x), 2 * plain)
    new(x).sum().backward()
    assert seen == (["pre", "pre", "backward pre", "Linear"] if not after else seen)
    for handle in handles:
        handle.remove()
    seen.clear()
    assert torch.equal(new(x), plain)
    assert seen == []


def test_accelerates_hook_wraps_the_new_layer():
    old, new = _old_and_new()
    hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
    add_hook_to_module(old, hook)
    carry_hooks(old, new)
    assert new._hf_hook is hook
    x = torch.randn(4, 3)
    assert torch.equal(new(x), old(x))
    assert new.forward.args[0] is new
