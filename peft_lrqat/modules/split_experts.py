"""From one packed layer for all experts of a projection to one for each expert, as files have them, and back."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..formats.source import LayerInfo
from ..grid import GridTensor, join_rows, rows_of
from .experts import Experts
from .packed import QuantizedLinear, QuantizedStack, merged_layer


class ExpertPart:
    """What files hold of one expert in one part of a projection, read from the layer of all experts.

    Attributes:
        stack: that layer, adapted or merged.
        index: of the part among those of all experts, in the order of their rows.
        count: how many parts the layer has.
    """

    bias = None
    _parameters: ClassVar[dict[str, nn.Parameter]] = {}

    def __init__(self, stack: Any, index: int, count: int) -> None:
        self.stack, self.index, self.count = stack, index, count

    def _rows(self, rows: int) -> slice:
        height = rows // self.count
        return slice(self.index * height, (self.index + 1) * height)

    def of(self, whole: GridTensor) -> GridTensor:
        """This part of what the layer holds."""
        rows = self._rows(whole.codes.shape[0])
        scale, zero_point = rows_of(whole.scale, rows), rows_of(whole.zero_point, rows)
        return GridTensor(whole.codes[rows], scale, zero_point, whole.grid)

    def of_info(self, info: LayerInfo) -> LayerInfo:
        """This part of what the layer is."""
        return replace(info, out_features=info.out_features // self.count)

    def of_rows(self, per_row: torch.Tensor | None) -> torch.Tensor | None:
        """This part of what the layer has for each row."""
        return None if per_row is None else per_row[self._rows(per_row.shape[0])]


def parts_of(experts: Experts) -> dict[str, ExpertPart]:
    """Name of a part, within `experts`, -> the part; of the layers that hold all experts."""
    found = {}
    for projection, stack in experts.stacks.items():
        names = experts.parts[projection]
        count = experts.num_experts * len(names)
        for e in range(experts.num_experts):
            for place, name in enumerate(names):
                found[f"{e}.{name}"] = ExpertPart(stack, e * len(names) + place, count)
    return found


@torch.no_grad()
def split_experts(experts: Experts) -> None:
    """Replace packed layers of all experts by one for each expert and part, in place."""
    whole: dict[int, GridTensor] = {}
    for name, part in parts_of(experts).items():
        stack: QuantizedStack = part.stack
        if id(stack) not in whole:
            whole = {id(stack): stack.grid_tensor()}
        expert, _, last = name.partition(".")
        if expert not in experts._modules:
            experts.add_module(expert, nn.ModuleDict())
        layer = merged_layer(
            part.of(whole[id(stack)]), None, stack.bits, stack.compute_dtype, file_scale_dtype=stack.weight_scale.dtype
        )
        layer.training = experts.training
        experts.get_submodule(expert).add_module(last, layer)
    for projection in experts.parts:
        del experts._modules[projection]


@torch.no_grad()
def joined_experts(experts: Experts) -> Experts:
    """Make the same experts with one packed layer for each projection. The given ones stay as they are.

    Raises:
        ValueError: they are not all packed alike.
    """
    again = copy.copy(experts)
    again._modules = {n: child for n, child in experts._modules.items() if not n.isdigit()}
    for projection, names in experts.parts.items():
        layers: list[Any] = [experts.get_submodule(f"{e}.{name}") for e in range(experts.num_experts) for name in names]
        kinds = {
            (layer.grid, layer.bits, layer.activations, layer.weight_scale.dtype, layer.compute_dtype)
            if type(layer) is QuantizedLinear
            else type(layer).__name__
            for layer in layers
        }
        if len(kinds) > 1 or type(layers[0]) is not QuantizedLinear:
            raise ValueError(
                f"The experts of a layer are trained together, but those of the quantized model are not alike in "
                f"{projection!r}: {sorted(map(str, kinds))[:3]}. Leave them out with `exclude_modules=['experts']`."
            )
        first, tensors = layers[0], [layer.grid_tensor() for layer in layers]
        stack = merged_layer(
            join_rows(tensors),
            None,
            first.bits,
            first.compute_dtype,
            experts=experts.num_experts,
            file_scale_dtype=first.weight_scale.dtype,
        )
        again._modules[projection] = stack
    return again
