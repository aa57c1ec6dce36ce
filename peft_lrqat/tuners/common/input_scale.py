"""How an adapted layer rounds its input; and the learned fixed scale of it, which layers that are given one input have
in common.

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

from ...ops.activations import Activations, round_activations
from ...ops.inputs import linear_input
from ...ops.shared_inputs import shared_values
from ...ops.static_inputs import LearnedScale, round_learned, static_scale
from .decay import watch
from .packed_parameter import share, whole


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
        watch(self)

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
            watch(self)

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


class RoundsInput:
    """A layer whose input is rounded where the options of its adapters say so.

    Attributes:
        act_scales: nn.ModuleDict, adapter -> InputScale, where inputs have a fixed scale.
        adapter_options: adapter -> its configuration.
        name: of the module in the model.
    """

    act_scales: Any
    adapter_options: dict[str, Any]
    name: str
    _calibrated: set[str]  # the adapters whose fixed scale is known to be set
    _observer: Any = None  # while `calibrate_activations` runs: its `see` is called with the inputs

    @property
    def frozen(self) -> Any:
        """The base."""
        raise NotImplementedError

    def _add_input_scale(self, adapter: str, config: Any) -> None:
        """Give an adapter its fixed scale of inputs, if it has one: not a number until it is calibrated or loaded."""
        if config.learns_input_scale(self.name):
            self._calibrated.discard(adapter)
            self.act_scales[adapter] = InputScale(self.frozen.device)

    def _rounded(
        self, x: torch.Tensor, activations: Activations | None, adapters: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor | None, LearnedScale | None]:
        """Round an input, x (..., in), for these adapters.

        Returns:
            (rounded, None, None): x checked, in autocast's dtype and rounded, differentiable. Or, where the layers that
            are given one input round it together, (x, values, learned): x as it was, which the gradient belongs to,
            the numbers that it was rounded to, and the fixed scale that did it, if one did.
        """
        if activations is None:
            return linear_input(x, self.frozen), None, None
        learned = None
        if activations.static:
            if self._observer is not None:
                self._observer.see(x)
                return linear_input(x, self.frozen), None, None
            learned = self._learned_scale(adapters, activations.bits)
        values = shared_values(x, activations, self.frozen, learned)
        if values is not None:
            return x, values, learned
        x = linear_input(x, self.frozen)
        return (round_activations(x, activations) if learned is None else round_learned(x, learned)), None, None

    def _input_scale(self, adapters: list[str]) -> torch.Tensor | None:
        """The fixed scale of inputs with these adapters, fp32 (1,), as it is stored; None: inputs have none."""
        log2 = self._log2_scale(adapters)
        return None if log2 is None else static_scale(log2, self.frozen.scale_dtype)

    def _learned_scale(self, adapters: list[str], bits: int) -> LearnedScale | None:
        """The fixed scale of inputs with these adapters, to be learned; None: inputs have none."""
        log2 = self._log2_scale(adapters)
        return None if log2 is None else LearnedScale(log2, self.frozen.scale_dtype, bits)

    def _log2_scale(self, adapters: list[str]) -> torch.Tensor | None:
        """The parameter of the fixed scale of inputs with these adapters, (1,); None: inputs have none."""
        scales = self.act_scales
        if len(adapters) == 1 and (name := adapters[0]) in self._calibrated and name in scales:  # with little Python
            return whole(scales[name].weight)
        present = [name for name in adapters if name in scales]
        if len(present) != 1:  # which is seen at once; options, in every forward, would cost Python
            own = [name for name in adapters if name in self.adapter_options] or list(self.adapter_options)
            if not any(self.adapter_options[name].learns_input_scale(self.name) for name in own):
                return None
            raise ValueError(
                f"Fixed scales of activations (`act_scale='static'`) belong to an adapter, but layer {self.name!r} is "
                f"to work with {' and '.join(map(repr, present)) or 'none'}. Activate one adapter; for a reference "
                "model without adapter (DPO), load one of its own, or use act_scale='dynamic'."
            )
        if not self._is_calibrated(present[0]):
            raise ValueError(
                f"The fixed scale of the input of layer {self.name!r} is not set. Call "
                "`calibrate_activations(model, batches)` before training, or load a trained adapter."
            )
        scales[present[0]].settle()
        return whole(scales[present[0]].weight)

    @torch.compiler.assume_constant_result  # torch.compile asks once, while it compiles
    def _is_calibrated(self, adapter: str) -> bool:
        """Whether the fixed scale of an adapter is set, which it then remains."""
        if adapter not in self._calibrated and not bool(whole(self.act_scales[adapter].weight).isnan().any()):
            self._calibrated.add(adapter)
        return adapter in self._calibrated


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
