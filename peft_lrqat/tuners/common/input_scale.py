"""The learned fixed scale of a layer's input, and which layers have it in common: those that are given one input.

An engine makes one product of q, k and v, of gate and up, and of DeepSeek's q_a and kv_a (between which q_b stands),
and has one fixed scale for what goes in: vLLM 0.32 has one place for it, and copies the scale of each of the layers
there as it reads the file, so that the last one stays (`CompressedTensorsW8A8Int8` in its source). A scale for each of
them would be trained, and not served. One also spares two of three roundings (`ops/shared_inputs.py`).

Which layers that are is seen while `calibrate_activations` runs: those of one module that were given the same tensors.
They then have one parameter, under the name of each of them, in the model as in its files. A file is read back so:
layers of a module whose scales are equal in it have one parameter again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .decay import watch
from .packed_parameter import share


class AdapterWeight(nn.Module):
    """One adapter's `weight`, a parameter of a layer, with no forward of its own.

    It is a module so that the parameter's name is `<what>.<adapter>.weight`, as lora_A's is: TRL copies an adapter by
    names that hold ".default.".
    """

    weight: nn.Parameter

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class InputScale(AdapterWeight):
    """log2 of the fixed scale of a layer's input, fp32 (1,): not a number until it is set.

    Attributes:
        before: those of the layers before this one in their module, as far as they may be given the same input. In a
            tuple, so that they are no submodules.
    """

    before: tuple[InputScale, ...] = ()
    _loaded_in: list | None = None  # the call of `load_state_dict` that had it last

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.full((1,), torch.nan, dtype=torch.float32, device=device))
        watch(self.weight)

    @property
    def in_common(self) -> bool:
        """Whether it is the parameter of a layer before."""
        return any(other.weight is self.weight for other in self.before)

    def join(self, other: InputScale) -> None:
        """Have the parameter of a layer before."""
        self.weight = other.weight

    def join_equal(self) -> None:
        """Have the parameter of the first layer before that has the same value, if one has."""
        equal = next((other for other in self.before if _equal(self.weight, other.weight)), None)
        if equal is not None:
            self.join(equal)

    def part(self) -> None:
        """Have a parameter of its own, of the same value."""
        if self.in_common:
            self.weight = nn.Parameter(self.weight.detach().clone(), self.weight.requires_grad)
            watch(self.weight)

    def settle(self) -> None:
        """Have the parameter of a layer before that has the same value: before the first use of an adapter that
        somebody has put into the model by setting parameters, as transformers' `load_adapter` does.

        Not among several processes, where DDP and FSDP2 know the parameters by then, nor while torch.compile traces.
        """
        alone = not (dist.is_available() and dist.is_initialized()) and not torch.compiler.is_compiling()
        if alone and not self.in_common:
            self.join_equal()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As torch's, but each layer's value is a tensor of its own: transformers saves no tensor under two names."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.in_common and not keep_vars:
            destination[prefix + "weight"] = destination[prefix + "weight"].clone()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list, *args: Any
    ) -> None:
        """As torch's, of a parameter that may be several layers': where what is loaded has it under one name only, as
        after `safetensors.torch.save_model`, it is that of all of them."""
        given = state_dict.get(prefix + "weight")
        self._loaded_in = None if given is None else missing
        if given is not None and self._written_in(missing) and not self._has(given):
            if _is_sharded(self.weight):
                args[-1].append(f"{prefix}weight: {_DIFFER} Load it before the model is sharded.")
                return
            if self.weight.requires_grad:
                warnings.warn(f"{_DIFFER} {_OWN_AGAIN}", stacklevel=2)  # without names: once for all layers
            self.part()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)
        if given is not None and not _is_sharded(self.weight):  # FSDP2 has noted who has which
            self.join_equal()

    def _has(self, value: torch.Tensor) -> bool:
        return _equal(value.to(self.weight.device, self.weight.dtype), self.weight)

    def _written_in(self, missing: list) -> bool:
        """Whether the parameter has its value already from this call of `load_state_dict`, as another layer's.

        Args:
            missing: torch's list of missing keys, which each call makes anew.
        """
        return any(other.weight is self.weight and other._loaded_in is missing for other in self.before)


_DIFFER = (
    "What is loaded has other fixed scales of inputs for layers that are given one input, as they were trained before "
    "layers had one in common."
)
_OWN_AGAIN = (
    "Each layer has its own again, a new parameter: make the optimizer, and wrap the model for several processes, "
    "after loading. Engines have one for all of these layers."
)


def _is_sharded(weight: Any) -> bool:
    return hasattr(weight, "to_local")


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = share(one.detach()), share(other.detach())
    return one.device == other.device and not one.is_meta and torch.equal(one, other)


def know_neighbours(layers: dict[str, Any], adapter: str) -> None:
    """Let the scales of an adapter know those of their neighbours.

    Where the scales of the layers' other adapters are in common, those of this one are, too: which layers are given one
    input is a matter of the model.

    Args:
        layers: name of the module -> layer, in the model's order.
        adapter: has just been added.
    """
    parents: dict[str, list[Any]] = {}
    for name, layer in layers.items():
        if adapter in layer.act_scales:
            parents.setdefault(name.rpartition(".")[0], []).append(layer)
    for children in parents.values():
        for number, layer in enumerate(children):
            before = [one for one in children[:number] if one.frozen.in_features == layer.frozen.in_features]
            scale = layer.act_scales[adapter]
            scale.before = tuple(one.act_scales[adapter] for one in before)
            known = next((one for one in before if _in_common(one, layer, adapter)), None)
            if known is not None:
                scale.join(known.act_scales[adapter])


def _in_common(one: Any, other: Any, without: str) -> bool:
    """Whether two layers have the scale of an adapter in common, other than one adapter's."""
    scales, others = one.act_scales, other.act_scales
    return any(scales[name].weight is others[name].weight for name in scales if name in others and name != without)


def set_scales(scales: Iterable[tuple[InputScale, torch.Tensor, list[int]]]) -> None:
    """Set scales to what was found in calibration.

    Args:
        scales: in the model's order, each with log2 of its value, and numbers of the tensors that its layer was given.
    """
    given: dict[InputScale, list[int]] = {}
    for scale, log2, tensors in scales:
        given[scale] = tensors
        same = next((other for other in scale.before if given.get(other) == tensors), None)
        if same is not None:
            scale.join(same)
        else:
            scale.part()
            scale.weight.copy_(log2.view(1))
