"""Merged layers that round their input as the model was trained (int8 codes, BitNet's), and what all merged layers
share.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..formats import bitnet, compressed_tensors
from ..formats.source import LayerInfo
from ..grid import PER_TENSOR, GridTensor
from ..ops.activations import Activations, round_activations
from ..ops.inputs import linear_input
from ..ops.shared_inputs import round_shared
from ..read_only import ReadOnlyTensor
from .generation import KeepsWeight
from .served_weight import ServedWeight

#: What an error says to whoever writes to the weight of a merged layer.
WHY_READ_ONLY = (
    "This layer is quantized: its weight is built from packed integers and cannot be changed. A float adapter cannot "
    "be merged into it without a second rounding; keep the adapter beside the model, or train one inside the rounding: "
    "LRQATConfig on the float model, or on what `load_quantized` makes of this checkpoint."
)


def merged_info(layer: Any, container_bits: int) -> LayerInfo:
    """What a merged layer is."""
    return LayerInfo(
        layer.out_features,
        layer.in_features,
        layer.grid,
        kind="linear",
        bias=layer.bias is not None,
        dtype=layer.compute_dtype,
        container_bits=container_bits,
        activations=getattr(layer, "activations", None),
    )


class KeepsScales(nn.Linear, KeepsWeight):
    """A merged layer: what `model.to(dtype)` does with it, and how it shows its weight.

    The weight is built in the new dtype, as a float weight would be. The scales follow only if that changes none of
    them: they are what was trained.
    """

    compute_dtype: torch.dtype
    weight_scale: torch.Tensor
    kv_bits: int | None = None  # of the model's KV cache, while adapters are merged in place
    _shown: bool | None = None  # whether the weight is shown transposed; None: it is not shown

    def show_weight(self, transposed: bool = False) -> None:
        """Let `named_parameters()` have a `weight` that is built when it is read (`served_weight.py`).

        Args:
            transposed: (in, out), for a layer that stands for a Conv1D.
        """
        self._shown = transposed
        weight: Any = ServedWeight(self, transposed)
        self._parameters = {"weight": weight, **self._stored_parameters()}

    def hide_weight(self) -> None:
        """End what `show_weight` began."""
        self._shown = None
        self._parameters = self._stored_parameters()

    def _stored_parameters(self) -> dict[str, nn.Parameter | None]:
        """A new dictionary: somebody may be walking the present one."""
        return {name: value for name, value in self._parameters.items() if name != "weight"}

    @contextlib.contextmanager
    def _as_stored(self) -> Iterator[None]:
        """Without the weight that is only shown."""
        shown = self._shown
        self.hide_weight()
        try:
            yield
        finally:
            if shown is not None:
                self.show_weight(shown)

    def _apply(self, fn: Any, recurse: bool = True) -> KeepsScales:
        before = self.weight_scale
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=before.device)).dtype
        with self._as_stored():
            super()._apply(fn, recurse)
            after = self.weight_scale
            cast = after.dtype != before.dtype and not after.is_meta and not before.is_meta
            if cast and not torch.equal(after.to(before.device, torch.float32), before.float()):
                self.weight_scale = before.to(after.device)
                warnings.warn(
                    f"The model is {after.dtype} now, but scales of its quantized layers are {before.dtype} numbers "
                    "that it does not hold; they stay what they are. The model computes with them exactly, and so does "
                    "`peft_lrqat.load_quantized` of what it saves, but transformers rounds them when it loads that: "
                    "call `model.float()` before saving.",
                    stacklevel=2,
                )
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._as_stored():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        with self._as_stored():
            super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_parameters": self._stored_parameters()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._shown is not None:
            self.show_weight(self._shown)


class _StoredWeight(KeepsScales):
    """An nn.Linear whose file holds integers and scales under the names `weight` and `weight_scale`.

    Buffers:
        weight_codes: integers, as the file's `weight` stores them.
        weight_scale: in the model's dtype, weight units per grid step.
    """

    weight_codes: torch.Tensor
    weight_scale: torch.Tensor
    container_bits: int
    activations: Activations  # how inputs are rounded

    def __init__(self, weight: GridTensor, tensors: dict[str, torch.Tensor], bias: nn.Parameter | None) -> None:
        """
        Args:
            tensors: "weight" and "weight_scale", as the format stores `weight`.
        """
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.codes.shape
        self.grid = weight.grid
        self.compute_dtype = tensors["weight_scale"].dtype
        self.register_buffer("weight_codes", tensors["weight"])
        self.register_buffer("weight_scale", tensors["weight_scale"])
        self.register_parameter("bias", bias)

    @property
    def codes(self) -> torch.Tensor:
        """int8 (out, in)."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # a property on purpose
        """The weight that codes and scales stand for, (out, in) in the model's dtype. Built anew; read-only."""
        return ReadOnlyTensor(self.weight_in(self.compute_dtype), WHY_READ_ONLY)

    def weight_in(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, (out, in), rounded once to `dtype`."""
        return (self.codes.float() * self.weight_scale.float()).to(dtype)

    def _factor(self, dtype: torch.dtype) -> torch.Tensor:
        """What the forward multiplies its input with, (out, in)."""
        return self.weight_in(dtype)

    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        """What the forward multiplies its input with, kept while the model generates."""
        slot = self.slot()
        kept = None
        if slot is not None:
            kept = slot.get(dtype, (self.weight_codes, self.weight_scale), lambda: self._factor(dtype))
        return self._factor(dtype) if kept is None else kept

    @property
    def info(self) -> LayerInfo:
        """What the layer is."""
        return merged_info(self, self.container_bits)

    def grid_tensor(self) -> GridTensor:
        """What the layer holds."""
        scale = self.weight_scale.float().view(-1, 1)
        return GridTensor(self.codes, scale[:1] if self.grid.group_size == PER_TENSOR else scale, None, self.grid)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination.pop(prefix + "weight_codes")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if prefix + "weight" in state_dict:
            state_dict[prefix + "weight_codes"] = state_dict.pop(prefix + "weight")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Int8Linear(_StoredWeight):
    """compressed-tensors "int-quantized": 8-bit container, int8 activations (W8A8 to the engines).

    Buffers:
        input_scale: (1,), in the model's dtype, the fixed scale of inputs; None: every token has its own.
    """

    container_bits = 8
    input_scale: torch.Tensor | None

    def __init__(
        self, weight: GridTensor, bias: nn.Parameter | None, dtype: torch.dtype, activations: Activations
    ) -> None:
        """
        Args:
            weight: (out, in), symmetric; scales (out, 1) or (1, 1), exactly representable in `dtype`.
        """
        tensors = compressed_tensors.integer_tensors(weight, dtype)
        super().__init__(weight, tensors, bias)
        self.activations = activations
        if activations.static:
            self.register_buffer("input_scale", tensors["input_scale"])
        else:
            self.input_scale = None

    def grid_tensor(self) -> GridTensor:
        fixed = self.input_scale
        return replace(super().grid_tensor(), input_scale=None if fixed is None else fixed.float())

    @property
    def codes(self) -> torch.Tensor:
        return self.weight_codes

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        if self.input_scale is None:
            x = round_shared(input, self.activations, self)
        else:
            x = round_activations(linear_input(input, self), self.activations, self.input_scale)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self._dense(x.dtype), bias)


class BitNetLinear(_StoredWeight):
    """transformers' own BitNet format (`AutoBitLinear`, offline): ternary codes, one scale, int8 activations.

    The file holds four codes a byte, code + 1 in two bits, from four blocks of rows; the scale multiplies the output.
    """

    container_bits = 2
    activations = bitnet.ACTIVATIONS

    def __init__(self, weight: GridTensor, dtype: torch.dtype) -> None:
        """
        Args:
            weight: (out, in), ternary; `out` a multiple of 4; one scale, exactly representable in `dtype`.
        """
        super().__init__(weight, bitnet.layer_tensors(weight, dtype), None)

    @property
    def codes(self) -> torch.Tensor:
        return bitnet.unpack(self.weight_codes)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        x = round_shared(input, self.activations, self)
        return nn.functional.linear(x, self._dense(x.dtype)) * self.weight_scale.to(x.dtype)

    def _factor(self, dtype: torch.dtype) -> torch.Tensor:
        return self.codes.to(dtype)
