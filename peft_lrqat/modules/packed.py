"""The merged layer: an nn.Linear that owns compressed-tensors' buffers instead of a float weight."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..formats import bitnet, compressed_tensors
from ..formats.record import Record
from ..formats.source import LayerInfo
from ..grid import PER_TENSOR, GridTensor, dequantize
from ..ops import quantized_linear
from ..ops.activations import Activations
from ..ops.embedding import quantized_embedding
from ..ops.experts import expert_weights
from ..ops.inputs import check_ids, linear_input
from ..ops.linear import linear_weight
from ..ops.shared_inputs import round_shared
from ..packing import unpack
from ..read_only import ReadOnlyTensor
from .architecture import float_names, loading, module_names, skeleton_of
from .experts import Built
from .kv_cache import rounding_of
from .rounded_input import WHY_READ_ONLY, BitNetLinear, Int8Linear, KeepsScales, merged_info
from .served_weight import ServedWeight


class QuantizedLinear(KeepsScales):
    """A linear layer held as packed codes and scales, with the names that compressed-tensors gives them in a file.

    `save_pretrained` therefore writes a checkpoint of format "pack-quantized" and nothing else. The forward builds the
    weight in the input's dtype and drops it; the backward passes gradients to the input, so adapters can be trained on
    top. If the model was trained with rounded inputs, the input is rounded first.

    Buffers:
        weight_packed: int32 (out, ceil(in * bits / 32)).
        weight_scale: (out, groups), model dtype, weight units per grid step. A per-tensor scale is repeated per
            channel: engines have kernels for that.
        weight_shape: int64 (2,), (out, in).
        weight_zero_point: int32 (ceil(out * bits / 32), groups), packed along `out`; asymmetric grids only.

    Attributes:
        activations: how inputs are rounded; None: they are floats.
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_shape: torch.Tensor
    weight_zero_point: torch.Tensor | None

    def __init__(
        self,
        weight: GridTensor,
        bias: nn.Parameter | None,
        bits: int,
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None = None,
        activations: Activations | None = None,
    ) -> None:
        """
        Args:
            weight: (out, in); its scales are exactly representable in `dtype`.
            bits: container width.
            compute_dtype: of the weight, where the model's dtype does not hold the scales; None: `dtype`.
        """
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.codes.shape
        self.bits, self.grid, self.activations = bits, weight.grid, activations
        self.compute_dtype = compute_dtype or dtype
        tensors = compressed_tensors.packed_tensors(weight, bits, dtype)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        if "weight_zero_point" not in tensors:
            self.weight_zero_point = None
        self.register_parameter("bias", bias)

    @property
    def zero_point(self) -> torch.Tensor | None:
        """int8 (out, groups), or None."""
        packed = self.weight_zero_point
        return None if packed is None else compressed_tensors.unpack_zero_point(packed, self.bits, self.out_features)

    @property
    def codes(self) -> torch.Tensor:
        """int8 (out, in)."""
        return unpack(self.weight_packed, self.bits, self.in_features)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # a property on purpose
        """The weight that the codes and scales stand for, (out, in) in the model's dtype. Built anew; read-only."""
        weight = dequantize(self.codes, self.weight_scale.float(), self.zero_point, self.compute_dtype)
        return ReadOnlyTensor(weight, WHY_READ_ONLY)

    @property
    def info(self) -> LayerInfo:
        """What the layer is."""
        return merged_info(self, self.bits)

    def grid_tensor(self) -> GridTensor:
        """What the layer holds."""
        scale, zero_point = self.weight_scale.float(), self.zero_point
        if self.grid.group_size == PER_TENSOR:
            scale, zero_point = scale[:1], None if zero_point is None else zero_point[:1]
        return GridTensor(self.codes, scale, zero_point, self.grid)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        how = self.activations
        input = linear_input(input, self) if how is None else round_shared(input, how, self)
        bias: torch.Tensor | None = self.bias
        if bias is not None and bias.dtype != input.dtype:
            bias = bias.to(input.dtype)
        weight = self._kept_weight(input.dtype)
        if weight is not None:
            return nn.functional.linear(input, weight, bias)
        scale = self.weight_scale.float()
        return quantized_linear(
            input, self.weight_packed, scale, None, self.zero_point, None, None, bias, 1.0, self.bits, "int", "fp32"
        )

    def _kept_weight(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The weight, (out, in) in `dtype`, where the layer keeps it: while the model generates."""
        slot = self.slot()
        if slot is None:
            return None
        buffers = self._buffers  # a step of decoding waits for Python, and `self.weight_packed` takes a microsecond
        stored = (buffers["weight_packed"], buffers["weight_scale"], buffers.get("weight_zero_point"))
        return slot.get(dtype, stored, lambda: self._dense(dtype))

    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that the forward multiplies an input of this dtype with."""
        packed, scale = self.weight_packed, self.weight_scale.float()
        constants = (1.0, self.bits, "int", "fp32", self.in_features, dtype)
        return linear_weight(packed, scale, None, self.zero_point, None, None, *constants)

    def extra_repr(self) -> str:
        rounded = "" if self.activations is None else f", activations=({self.activations.describe()})"
        return f"{super().extra_repr()}, bits={self.bits}{rounded}"


class QuantizedEmbedding(QuantizedLinear):
    """An embedding table held in the same way, while an adapter is merged in place; no file knows such a table."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Token ids (...) to their rows (..., in)."""
        check_ids(input)
        scale, dtype = self.weight_scale.float(), self.compute_dtype
        table = self._kept_weight(dtype)
        if table is not None:
            return nn.functional.embedding(input, table)
        return quantized_embedding(
            input,
            self.weight_packed,
            scale,
            self.zero_point,
            None,
            None,
            1.0,
            self.bits,
            self.in_features,
            "int",
            dtype,
        )


_SERVED: weakref.WeakKeyDictionary[QuantizedStack, dict[Any, Any]] = weakref.WeakKeyDictionary()


class QuantizedStack(QuantizedLinear):
    """One projection of all experts of a mixture, held in the same way, while an adapter is merged in place.

    Attributes:
        experts: how many; each has `out_features / experts` rows.
    """

    experts: int

    @property
    def _served(self) -> dict[Any, Any]:
        """What is shown; in no copy and no file of the module."""
        return _SERVED.setdefault(self, {})

    def forward(self, experts: torch.Tensor | None, dtype: torch.dtype) -> Built:  # type: ignore[override]  # see there
        """The weights of some experts: see `modules.experts.Experts`."""
        listed = torch.arange(self.experts, device=self.weight_packed.device) if experts is None else experts
        return Built(self._some(experts, dtype), lambda which: self._some(listed[which], dtype))

    @torch.no_grad()
    def _some(self, experts: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        stored = (self.weight_packed, self.weight_scale.float(), None, self.zero_point, None, None)
        constants = (1.0, self.bits, "int", "fp32", self.in_features, dtype)
        return expert_weights(*stored, experts, self.experts, *constants)

    def kept(self, dtype: torch.dtype) -> torch.Tensor | None:
        weight = self._kept_weight(dtype)
        return None if weight is None else weight.view(self.experts, -1, self.in_features)

    def show_weight(self, transposed: bool = False) -> None:
        """Have `Experts` show the weight, under the names that files give to its parts (`served`)."""
        self._shown = transposed

    def served(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Name, within the experts' module, -> weight to be read, of each expert and part; none if it is not shown.

        Args:
            names: of the parts of an expert's rows, in order.
        """
        if self._shown is None:
            return {}
        if names not in self._served:  # a walk over a model's parameters comes here for every name
            views = [_ServedPart(self, e, i, len(names)) for e in range(self.experts) for i in range(len(names))]
            called = [f"{e}.{name}.weight" for e in range(self.experts) for name in names]
            self._served[names] = views, dict(zip(called, map(ServedWeight, views), strict=True))
        return self._served[names][1]


class _ServedPart:
    """What a `ServedWeight` asks for, of one part of an expert."""

    activations = None

    def __init__(self, stack: QuantizedStack, expert: int, place: int, places: int) -> None:
        self._stack, self._expert, self._place, self._places = weakref.ref(stack), expert, place, places
        self.out_features = stack.out_features // (stack.experts * places)
        self.in_features, self.compute_dtype = stack.in_features, stack.compute_dtype

    @property
    def weight_scale(self) -> torch.Tensor:
        return self._get().weight_scale

    @property
    def weight(self) -> ReadOnlyTensor:
        stack = self._get()
        expert = torch.tensor([self._expert], device=stack.weight_packed.device)
        whole = stack._some(expert, self.compute_dtype)[0]
        part = whole[self._place * self.out_features : (self._place + 1) * self.out_features]
        return ReadOnlyTensor(part.clone() if self._places > 1 else part, WHY_READ_ONLY)

    def _get(self) -> QuantizedStack:
        stack = self._stack()
        assert stack is not None  # who has the parts keeps them alive, and it is the stack
        return stack


#: The layers that merging makes; a model that has one is quantized.
MERGED: tuple[type[nn.Linear], ...] = (QuantizedLinear, Int8Linear, BitNetLinear)


def merged_layer(
    weight: GridTensor,
    bias: nn.Parameter | None,
    bits: int,
    dtype: torch.dtype,
    *,
    transposed: bool = False,
    embedding: bool = False,
    experts: int = 1,
    activations: Activations | None = None,
    file_scale_dtype: torch.dtype | None = None,
) -> nn.Module:
    """The layer of a quantized model: the one place that chooses its class.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        bits: width of the stored codes; BitNet's format has its own.
        dtype: the model's.
        transposed: whether it takes the place of a Conv1D (GPT-2). compressed-tensors has no packed form of that, so
            it becomes a dense Conv1D whose weight holds the grid's exact values.
        embedding: whether it takes the place of an embedding.
        experts: of how many experts it is a projection, if it is a stack of them.
        activations: how inputs are rounded, None: they are floats.
        file_scale_dtype: of the scales in the file that the layer was read from; they stay in it where `dtype` does
            not hold them. None: `dtype` holds them.

    Raises:
        ValueError: the container is too narrow; BitNet's layer has no place for a bias; `dtype` does not hold the
            scales of a layer whose inputs are rounded.
    """
    if transposed:
        layer = Conv1D(weight.codes.shape[0], 0)
        layer.weight = nn.Parameter(weight.dequantize(dtype).t().contiguous(), requires_grad=False)
        layer.nx = weight.codes.shape[1]
        layer.register_parameter("bias", bias)
        return layer
    if activations != bitnet.ACTIVATIONS and bits < weight.grid.code_bits:
        raise ValueError(
            f"Codes of the grid {weight.grid.describe()} take {weight.grid.code_bits} bits, but the container has "
            f"{bits} (`container_bits`). Use {weight.grid.code_bits} or more."
        )
    exact = file_scale_dtype is None or torch.equal(weight.scale.to(dtype).float(), weight.scale)
    as_int8 = compressed_tensors.multiplies_int8(weight.grid, bits, activations)
    if not exact and (as_int8 or activations == bitnet.ACTIVATIONS):
        raise ValueError(
            f"The scales of a layer with rounded activations are {file_scale_dtype} numbers that {dtype} does not hold."
            f" Load the model with `dtype={file_scale_dtype}`, or in torch.float32."
        )
    if activations is not None and activations.static and not (as_int8 and weight.input_scale is not None):
        raise ValueError(
            "A layer with a fixed scale of its input is stored as int8 codes per channel, with that scale."
        )
    if activations == bitnet.ACTIVATIONS:
        if bias is not None:
            raise ValueError("A layer with a bias cannot be stored in BitNet's format. Use 'compressed-tensors'.")
        return BitNetLinear(weight, dtype)
    if as_int8 and activations is not None:
        return Int8Linear(weight, bias, dtype, activations)
    kind = QuantizedEmbedding if embedding else QuantizedStack if experts > 1 else QuantizedLinear
    packed = kind(weight, bias, bits, dtype if exact else file_scale_dtype or dtype, dtype, activations)
    if isinstance(packed, QuantizedStack):
        packed.experts = experts
    return packed


#: An attribute of models whose integers were made in memory: what they were called before.
FLOAT_NAME = "_float_name"


def describe(model: Any, record: Record | None = None) -> str:
    """Set `config.quantization_config` to what `save_pretrained` writes of a model with layers of `merged_layer`.

    Where transformers cannot load it, it warns.

    Args:
        record: how they were trained, for config.json's own entry; None: that stays as it is.

    Returns:
        Why transformers cannot load it, or computes otherwise than was trained; "" if there is nothing.

    Raises:
        ValueError: BitNet's layers stand beside layers of another format, which no `quantization_config` describes.
    """
    modules = dict(model.named_modules())
    quantized: dict[str, Any] = {name: module for name, module in modules.items() if isinstance(module, MERGED)}
    kinds = {type(module) for module in quantized.values()}
    # what a module is called in the model, and in files
    names = module_names(model, quantized)
    stored = {**quantized, **{file: quantized[name] for name, file in names.items() if file is not None}}
    floats = float_names(model, modules, quantized)
    cache = rounding_of(model)
    if record is not None:  # its integers were made here, and no folder has them
        setattr(model, FLOAT_NAME, getattr(model, "name_or_path", None))
        record = replace(record, cache=cache)
        record.with_layers({name: layer.grid for name, layer in stored.items()}).put_into(model.config)
    if BitNetLinear in kinds:
        if len(kinds) > 1:
            raise ValueError("BitNet's layers stand beside layers of another format. One checkpoint holds one format.")
        model.config.quantization_config = bitnet.quantization_config(floats)
        return ""
    schemes = {name: (layer.grid, layer.info.container_bits, layer.info.activations) for name, layer in stored.items()}
    needs = loading(skeleton_of(model), quantized)
    model.config.quantization_config = compressed_tensors.quantization_config(floats, schemes, needs, cache)
    problem = compressed_tensors.loading_problem(schemes.values(), needs, cache)
    if problem:
        floats_there = not compressed_tensors.loading_problem([(g, b, None) for g, b, _ in schemes.values()], needs)
        does = "loads" if floats_there else "will not load"
        warnings.warn(
            f"transformers {does} what `save_pretrained` writes of this model{', but' if floats_there else ':'} "
            f"{problem}. What works: `peft_lrqat.load_quantized`"
            + ("; and transformers with what `export(..., format='torchao')` writes." if needs.cuts else "."),
            stacklevel=4,
        )
    return problem
