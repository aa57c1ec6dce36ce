"""What tests of CUDA graphs need: a recorder for CPUs, and trainings to compare."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_lrqat.modules.block_graphs import BlockGraphs
from tests.models import adapted, tiny, tokens


class RunsAgain:
    """Stands for `block_recording.Recorder`: what is recorded is run anew, on the same buffers."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        return run

    def no_waiting(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def place(self) -> Any:
        return "here"

    def draws(self) -> torch.Tensor:
        return torch.get_rng_state()

    def undraw(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


def trained(
    model: torch.nn.Module,
    graphs: bool,
    shapes: tuple[tuple[int, int], ...] = ((2, 16),) * 4,
    autocast: bool = False,
    checkpointing: dict[str, Any] | None = None,
    evaluate: bool = True,
) -> tuple[list[torch.Tensor], dict[str, int] | None]:
    """Train with two batches a step and an evaluation after each.

    Args:
        shapes: of the batches of each step.
        checkpointing: of `gradient_checkpointing_enable`.

    Returns:
        All losses and gradients, and the counts of `BlockGraphs`.
    """
    device = next(model.parameters()).device
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing or {"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    found: list[torch.Tensor] = []
    blocks = BlockGraphs(model) if graphs else None
    if blocks is not None:
        blocks.attach()

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            return model(input_ids=ids, labels=ids).loss

    for step, shape in enumerate(shapes):
        for part in range(2):
            one = loss(tokens(*shape, seed=10 * step + part).to(device))
            one.backward()
            found.append(one.detach())
        found += [p.grad.clone() for p in parameters if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        if evaluate:
            model.eval()
            with torch.no_grad():
                found.append(loss(tokens(2, 9).to(device)))
            model.train()
    if blocks is not None:
        blocks.detach()
    return found, None if blocks is None else blocks.counts


def lora(base=None, **options):
    torch.manual_seed(0)
    return get_peft_model(base or tiny(), LoraConfig(**{"target_modules": "all-linear", "r": 4, **options}))


def lrqat(family="llama", **options):
    return adapted(tiny(family), range_method="minmax", **options)  # the search would take most of a test's time


def equal(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def attached(model: nn.Module) -> BlockGraphs:
    graphs = BlockGraphs(checkpointed(model))
    graphs.attach()
    return graphs


def step(model: nn.Module, ids: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Loss and gradients, which are taken away."""
    ids = tokens(2, 16) if ids is None else ids
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = [loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]]
    model.zero_grad(set_to_none=True)
    return found
