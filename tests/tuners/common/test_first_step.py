"""Whoever watches parameters sees the first step of the next optimizer that trains them, once, with its groups."""

from __future__ import annotations

import torch

from peft_lrqat.tuners.common.first_step import FirstStep


def parameters(count: int) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.zeros(2)) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.ones(2)
    return made


def test_only_the_next_optimizer_of_a_watched_parameter_is_seen():
    seen: list[tuple[float, list]] = []
    first = FirstStep("_watched_in_a_test", lambda _, found: seen.extend((group["lr"], had) for group, had in found))
    a, b, c, other = parameters(4)
    for parameter, value in ((a, 1), (b, 2), (c, 3)):
        first.watch(parameter, value)
    torch.optim.SGD([other], lr=0.5).step()  # somebody else's
    assert not seen
    groups = [{"params": [other, a]}, {"params": [parameters(1)[0]], "lr": 0.2}, {"params": [b, c], "lr": 0.3}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    optimizer.step()
    assert seen == [(0.1, [1]), (0.3, [2, 3])]
    optimizer.step()
    torch.optim.SGD([b], lr=0.4).step()
    assert len(seen) == 2  # seen once
    first.watch(c, 4)
    torch.optim.SGD([c], lr=0.6).step()
    assert seen[2:] == [(0.6, [4])]
