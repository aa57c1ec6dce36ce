"""Trainings of low-bit SR whose blocks may be replayed as graphs, on a CPU or a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_lrqat import LowBitAdamW
from peft_lrqat.tuners.lowbit_sr import LowBitTensor
from tests.lowbit_sr import integers, trainable
from tests.models import tokens


def optimizer_of(model: nn.Module, **options: Any) -> LowBitAdamW:
    return LowBitAdamW(trainable(model), lr=3e-3, **options)


def loss_of(model: Any, seed: int = 1, autocast: bool = False, length: int = 16) -> torch.Tensor:
    ids = tokens(2, length, seed=seed).to(model.device)
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=autocast):
        return model(input_ids=ids, labels=ids).loss


def run(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6, accumulate: int = 1, autocast: bool = False
) -> list[torch.Tensor]:
    """Losses, evaluations in between, and everything that is trained at the end, with the optimizer's state."""
    found = []
    for step in range(steps):
        for part in range(accumulate):
            loss = loss_of(model, 10 * step + part, autocast, length=16 if step % 3 else 12)
            (loss / accumulate).backward()
            found.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            found.append(loss_of(model))
        model.train()
    found += integers(model)
    found += [p.detach() for p in trainable(model) if not isinstance(p, LowBitTensor)]
    for parameter in model.parameters():
        state = optimizer.state.get(parameter, {})
        found += [state[name] for name in sorted(state) if isinstance(state[name], torch.Tensor)]
    return found


def low_bit_weights(model: nn.Module) -> list[Any]:
    """Those that are trained."""
    return [p for p in trainable(model) if isinstance(p, LowBitTensor)]


def several_forwards(model: Any, backwards: int) -> list[torch.Tensor]:
    """As DPO does, with `model.optimizer`.

    Returns:
        The losses.
    """
    losses = [loss_of(model, seed) for seed in (5, 6, 7)]
    for loss in losses if backwards == 3 else [torch.stack(losses).sum()]:
        loss.backward()
    model.optimizer.step()
    return [loss.detach() for loss in losses]
