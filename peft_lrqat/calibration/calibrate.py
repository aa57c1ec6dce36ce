"""What the layers of a model receive on calibration text: one decoder block at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


class _EnoughError(Exception):
    """Ends a forward of which the rest is not needed."""


class BlockInputs:
    """What the decoder blocks receive, for every calibration batch.

    Attributes:
        hidden: one tensor (batch, length, width) a batch: the input of the block that is next.
        calls: for each batch, for each block, its other arguments (masks, rotary tables), which do not depend on
            `hidden`; equal tensors are shared, so they take little memory.
        masks: bool (batch, length) or None a batch: which tokens count.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        self.hidden: list[torch.Tensor] = []
        self.calls: list[list[tuple[tuple, dict[str, Any]]]] = []
        self.masks: list[torch.Tensor | None] = []
        for batch in batches:
            self._record(model, blocks, batch)

    def _record(self, model: nn.Module, blocks: nn.ModuleList, batch: Mapping[str, torch.Tensor]) -> None:
        calls: list[tuple[tuple, dict[str, Any]]] = []

        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if not calls:
                self.hidden.append(hidden)
            calls.append((args[1:], kwargs))
            if module is blocks[-1]:
                raise _EnoughError

        handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
        try:
            with contextlib.suppress(_EnoughError):
                model(**batch, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self.calls.append(calls)
        mask = batch.get("attention_mask")
        self.masks.append(None if mask is None or bool(mask.all()) else mask.bool())

    def run(self, index: int, block: nn.Module) -> list[torch.Tensor]:
        """Outputs of block number `index`, one (batch, length, width) a batch."""
        found = []
        for hidden, calls in zip(self.hidden, self.calls, strict=True):
            args, kwargs = calls[index]
            out = block(hidden, *args, **kwargs)
            found.append(out[0] if isinstance(out, tuple) else out)
        return found


class _Hessians:
    """Hooks that add up x^T x. Layers that receive the same tensor (query, key, value) share one sum."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.leader: dict[str, str] = {}  # layer -> the layer that holds the sum of its input
        self.mask: torch.Tensor | None = None
        self._seen: dict[int, tuple[str, torch.Tensor]] = {}  # the tensors too: their ids are theirs while they live
        self._handles = [
            layer.register_forward_pre_hook(lambda module, args, name=name: self._add(name, args[0]))
            for name, layer in layers.items()
        ]

    def start(self, mask: torch.Tensor | None) -> None:
        """Before each batch."""
        self.mask = mask
        self._seen.clear()

    def _add(self, name: str, x: torch.Tensor) -> None:
        leader, _ = self._seen.setdefault(id(x), (name, x))
        self.leader[name] = leader
        if leader == name:
            masked = self.mask is not None and x.shape[:2] == self.mask.shape
            rows = (x[self.mask] if masked else x.reshape(-1, x.shape[-1])).float()
            before = self.sums.get(name)
            self.sums[name] = rows.t() @ rows if before is None else before.addmm_(rows.t(), rows)

    def finish(self) -> dict[str, torch.Tensor]:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()
        return {name: self.sums[leader] for name, leader in self.leader.items()}


def collect_hessians(
    inputs: BlockInputs, index: int, block: nn.Module, layers: Mapping[str, nn.Module]
) -> dict[str, torch.Tensor]:
    """The sum of x^T x over the inputs of each layer, fp32 (in, in); a layer that no token reached has none."""
    hessians = _Hessians(layers)
    try:
        for hidden, calls, mask in zip(inputs.hidden, inputs.calls, inputs.masks, strict=True):
            hessians.start(mask)
            args, kwargs = calls[index]
            block(hidden, *args, **kwargs)
    finally:
        found = hessians.finish()
    return found
