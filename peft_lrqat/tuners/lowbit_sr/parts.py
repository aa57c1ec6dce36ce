"""Where a layer keeps its adapters' weights, and how state dicts see them.

A `LowBitTensor` is three plain tensors. Files, `load_state_dict` and transformers' own loader see these, under names of
their own, and never the wrapper or a float weight:

    lowbitsr_weight.<adapter>.weight    the parameter; in no state dict
    lowbitsr_codes.<adapter>            its packed codes        int32 (out, words)
    lowbitsr_scale.<adapter>            its scales              fp32  (rows, groups)
    lowbitsr_stream.<adapter>           key and step of its random numbers    int64 (2,)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..common.input_scale import AdapterWeight
from .tensor import LowBitTensor

#: Name in a state dict -> attribute of `LowBitTensor`.
PARTS = {"lowbitsr_codes": "packed", "lowbitsr_scale": "scale", "lowbitsr_stream": "stream"}


class LowBitWeight(AdapterWeight):
    """One adapter's `LowBitTensor`; in no state dict."""

    def _apply(self, fn: Any, recurse: bool = True) -> LowBitWeight:
        # torch swaps a moved subclass for a new one, which would leave gradient hooks behind: only where it must
        if self.weight.device != fn(torch.empty(0, device=self.weight.device)).device:
            super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


class PartView(nn.Module):
    """One of `PARTS` of every adapter, as a state dict has it. Setting an entry writes to the weight."""

    def __init__(self, weights: nn.ModuleDict, attribute: str) -> None:
        super().__init__()
        # not a submodule: it has the parameters already
        object.__setattr__(self, "_weights", weights)
        object.__setattr__(self, "_attribute", attribute)

    def __getattr__(self, name: str) -> Any:
        weights = self.__dict__.get("_weights", ())
        return getattr(weights[name].weight, self._attribute) if name in weights else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__.get("_weights", ()):
            super().__setattr__(name, value)
            return
        if getattr(self, name).is_meta:
            self._take(name, value.detach())
            return
        self._weights[name].weight.write(self._attribute, value.detach())

    def _take(self, adapter: str, value: torch.Tensor) -> None:
        """Put a tensor in the place of one that has no values yet (PEFT's `low_cpu_mem_usage`), without a copy."""
        empty = self._weights[adapter].weight
        inner = {name: getattr(empty, name) for name in PARTS.values()} | {self._attribute: value}
        weight = LowBitTensor(*inner.values(), *empty._meta)
        self._weights[adapter].weight = nn.Parameter(weight, empty.requires_grad)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for adapter in self._weights:
            destination[prefix + adapter] = getattr(self, adapter).detach()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        for adapter in self._weights:
            here, found = getattr(self, adapter), state_dict.get(prefix + adapter)
            if found is None:
                missing.append(prefix + adapter)
            elif found.shape != here.shape or found.dtype != here.dtype:
                errors.append(
                    f"{prefix}{adapter} is {found.dtype} {tuple(found.shape)} in the file, but this model needs "
                    f"{here.dtype} {tuple(here.shape)}: the adapter was made for another grid or architecture."
                )
            else:
                setattr(self, adapter, found)
        known = {prefix + adapter for adapter in self._weights}
        unexpected.extend(key for key in state_dict if key.startswith(prefix) and key not in known)
