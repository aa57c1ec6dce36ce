"""Whoever watches modules sees the first step of the next optimizer that trains their weights, once."""

from __future__ import annotations

import torch
from torch import nn

from peft_lrqat.tuners.common.first_step import FirstStep


def modules(count: int) -> list[nn.Module]:
    made: list[nn.Module] = [nn.Linear(2, 1, bias=False) for _ in range(count)]
    for module in made:
        module.weight.grad = torch.ones(1, 2)
    return made


def test_only_the_next_optimizer_of_a_watched_module_is_seen():
    seen: list[tuple[float, list]] = []
    first = FirstStep(lambda _, found: seen.extend((group["lr"], had) for group, had in found))
    a, b, c, other = modules(4)
    for module, value in ((a, 1), (b, 2), (c, 3)):
        first.watch(module, value)
    torch.optim.SGD([other.weight], lr=0.5).step()  # somebody else's
    assert not seen
    b.weight = nn.Parameter(b.weight.detach().double())  # as PEFT casts
    groups = [
        {"params": [other.weight, a.weight]},
        {"params": [modules(1)[0].weight], "lr": 0.2},
        {"params": [b.weight, c.weight], "lr": 0.3},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    optimizer.step()
    assert seen == [(0.1, [1]), (0.3, [2, 3])]
    optimizer.step()
    torch.optim.SGD([b.weight], lr=0.4).step()
    assert len(seen) == 2  # seen once
    first.watch(c, 4)
    torch.optim.SGD([c.weight], lr=0.6).step()
    assert seen[2:] == [(0.6, [4])]
