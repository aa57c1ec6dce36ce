"""An embedding table with the adapter inside the rounding; only where `target_modules` names it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ...ops.embedding import quantized_embedding
from ...ops.inputs import check_ids
from ..common.packed_parameter import whole
from ..common.plain import scales_rows
from .config import LRQATConfig
from .layer import LRQATLinear


class LRQATEmbedding(LRQATLinear):
    """An nn.Embedding: table rows take the place of output features, the embedding's width that of input features.

    compressed-tensors and the engines know no packed embeddings, so merging makes a dense table whose values lie
    exactly on the grid.
    """

    embed_scale: torch.Tensor | float | None

    def __init__(self, base_layer: nn.Embedding, adapter_name: str, config: LRQATConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config, **kwargs)
        # what a model's own embedding class multiplies rows with: a buffer (Gemma 3), or a float (BART)
        scale: Any = base_layer.embed_scale if scales_rows(base_layer) else None
        if isinstance(scale, torch.Tensor):
            self.register_buffer("embed_scale", scale, persistent=False)
        else:
            self.embed_scale = scale
        # the module that was replaced, without its weight: merging and unloading put the new weight into it. Kept
        # outside of the module tree.
        object.__setattr__(self, "_shell", base_layer)

    def _run(self, x: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        check_ids(x)
        frozen = self.base_layer
        table = self._kept_weight(frozen.compute_dtype, adapters)
        return self._scaled(self._rows(x, adapters) if table is None else nn.functional.embedding(x, table))

    def _rows(self, x: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        frozen = self.base_layer
        shift, A, B, c = self._operands(adapters)
        return quantized_embedding(
            x,
            whole(frozen.base),
            self._scale(shift),
            whole(frozen.zero_point),
            A,
            B,
            c,
            frozen.grid.bits,
            frozen.in_features,
            frozen.downcast,
            frozen.compute_dtype,
            self._units(shift),
        )

    def _run_merged(self, x: torch.Tensor) -> torch.Tensor:
        return self._scaled(self.base_layer(x))

    def _scaled(self, y: torch.Tensor) -> torch.Tensor:
        scale = self.embed_scale
        return y if scale is None else y * (scale.to(y.dtype) if isinstance(scale, torch.Tensor) else scale)

    def _around(self, weight: torch.Tensor) -> nn.Module:
        layer: Any = copy.copy(self._shell)  # not deeply: hooks may be methods of anything
        for forward in ("_hf_hook", "_old_forward", "forward"):  # accelerate's, of the shell; `_give_to` hooks anew
            vars(layer).pop(forward, None)
        layer._parameters, layer._buffers = {}, dict(vars(self._shell)["_buffers"])
        layer.register_parameter("weight", nn.Parameter(weight.contiguous(), requires_grad=False))
        return layer.to(weight.device)

    @property
    def kind(self) -> Any:
        return "embedding"

    def _stored(self, packed: Any) -> nn.Module:
        return self._around(packed.grid_tensor().dequantize(packed.compute_dtype))

    def _as_it_was(self) -> nn.Module:
        return self._around(self.frozen.dense())
