"""The fixed scales of activations (`act_scale="static"`), from what the layers receive on calibration text: how large
they start, and which layers have one in common."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..tuners.common.input_scale import set_scales
from ..tuners.common.layer import MergingLayer
from .calibrate import by_name, each
from .modes import in_eval


def calibrate_activations(model: nn.Module, batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]]) -> None:
    """Set the fixed scales of the active adapter, so that the grid holds the largest inputs of some text.

    Call it after `get_peft_model` and before an optimizer is made, which then learns the scales. Layers that are given
    one input (q, k and v; gate and up) get one scale, one parameter, as engines have it. While it runs, weights are
    rounded and inputs are not. With several processes, give each the same batches.

    Args:
        model (nn.Module): a model with an adapter of `act_scale="static"`.
        batches (Iterable): token ids, int64 (batch, length), or what the model's forward takes by name.

    Raises:
        ValueError: no active adapter has fixed scales; the model is merged; there are no batches, or one is neither
            token ids nor a mapping, such as a text; a layer received no input, only zeros, or values that are not
            finite. No scale was changed then.

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_lrqat import LRQATConfig, calibrate_activations
        >>> model = get_peft_model(base, LRQATConfig(bits=8, act_bits=8, act_scale="static"))
        >>> calibrate_activations(model, [tokenizer(texts[0][:64], return_tensors="pt")])
    """
    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MergingLayer) and sum(a in module.act_scales for a in module.active_adapters) == 1
    }
    if not layers or any(layer.merged for layer in layers.values()):
        raise ValueError(
            "The model has no single active, unmerged adapter with fixed scales of activations. Make one with "
            "`act_scale='static'`, or leave the calibration out."
        )
    # tensors of inference mode do not tell whether they were written to, so who is given the same is not seen in it
    made_in_it = any(scale.is_inference() for layer in layers.values() for scale in layer.act_scales.parameters())
    with torch.inference_mode(made_in_it), torch.no_grad():
        _calibrate(model, layers, batches)


def _calibrate(model: nn.Module, layers: Mapping[str, Any], batches: Iterable[Any]) -> None:
    inputs = _Inputs()
    seen = {name: _Observer(inputs, layer.frozen.device) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer._observer = seen[name]
        with in_eval(model):
            empty = True
            for batch in each(batches, "batches"):
                here, empty = by_name(batch, "batches"), False
                device = next(iter(layers.values())).frozen.device
                model(**{name: value.to(device) if hasattr(value, "to") else value for name, value in here.items()})
    finally:
        for layer in layers.values():
            layer._observer = None
    if empty:
        raise ValueError("`batches` is empty. Give token ids, int64 (batch, length), of some text.")
    for name, observer in seen.items():
        value = observer.largest
        if not bool(torch.isfinite(value) & (value > 0)):
            name = layers[name].name  # the one that patterns match, without PEFT's prefix
            raise ValueError(
                f"The largest input of layer {name!r} on the calibration text is {float(value)}. Give text that "
                f"reaches every layer, or leave this one float: `act_bits_pattern={{{name!r}: None}}`."
            )
    found = []
    for name, layer in layers.items():
        (adapter,) = [a for a in layer.active_adapters if a in layer.act_scales]
        steps = 2.0 ** (layer.adapter_options[adapter].activations_of(layer.name).bits - 1) - 0.5
        found.append((layer.act_scales[adapter], (seen[name].largest / steps).log2(), seen[name].given))
    set_scales(found)


class _Inputs:
    """Numbers of the tensors that layers are given: several may be given the same."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._known: Any = WeakTensorKeyDictionary()  # tensor -> its version, its number

    def number(self, x: torch.Tensor) -> int:
        if x.is_inference():  # without a version
            return next(self._numbers)
        version, number = self._known.get(x, (None, None))
        if version != x._version:
            number = next(self._numbers)
            self._known[x] = x._version, number
        return number


class _Observer:
    """What one layer is given.

    Attributes:
        largest: the largest magnitude, fp32 ().
        given: the number of each tensor.
    """

    def __init__(self, inputs: _Inputs, device: torch.device) -> None:
        self._inputs = inputs
        self.largest, self.given = torch.zeros((), device=device), list[int]()

    def see(self, x: torch.Tensor) -> None:
        """Take note of an input."""
        self.largest = torch.maximum(self.largest, x.detach().abs().amax().float())
        self.given.append(self._inputs.number(x))
