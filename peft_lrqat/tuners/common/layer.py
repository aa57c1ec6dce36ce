"""What the layers of both methods share: a base of integers that merging replaces and unmerging puts back."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


class MergingLayer(LoraLayer):
    """A layer over a `FrozenWeight` whose `base_layer` is what the checkpoint will hold while adapters are merged.

    A subclass sets `_before_merge` to None, has `_run_one(x, adapter)`, and calls `_put_merged`.
    """

    base_layer: Any
    _before_merge: Any

    @property
    def frozen(self) -> Any:
        """The base, also while an adapter is merged."""
        return self._before_merge or self.base_layer

    @property
    def kind(self) -> Any:
        """What the layer was before: "linear", "conv1d" or "embedding"."""
        return "conv1d" if self.frozen.transposed else "linear"

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: rounding is not additive."""
        return False

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.frozen.device, self.frozen.compute_dtype

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _run_one(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """The layer with one adapter; "__base__": with none."""
        raise NotImplementedError

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """Each sample with its own adapter: one weight for each adapter in the batch."""
        out: torch.Tensor | None = None
        for name in dict.fromkeys(adapter_names):
            index = [i for i, other in enumerate(adapter_names) if other == name]
            part = self._run_one(x[index], name)
            if out is None:
                out = part.new_empty(x.shape[0], *part.shape[1:])
            out[index] = part
        return out if out is not None else self._run_one(x, "__base__")

    def _check_scale(self, adapter: str, safe_merge: bool, scale: torch.Tensor, *others: torch.Tensor | None) -> None:
        """ValueError unless the checkpoint can hold these scales; `safe_merge`: and all is finite."""
        if safe_merge and not all(torch.isfinite(t).all() for t in (scale, *others) if t is not None):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        dtype = self.frozen.compute_dtype
        if not torch.equal(scale.to(dtype).float().nan_to_num(), scale.nan_to_num()):
            raise ValueError(
                f"The model is {dtype} now, which cannot hold the scales of `scale_dtype={self.frozen.scale_dtype!r}` "
                "exactly. Call `model.float()` before merging (or cast the model back to what it was), or train with "
                "`scale_dtype='auto'`."
            )

    def _put_merged(self, merged: nn.Module, adapters: list[str]) -> None:
        # kept outside of the module tree: it is neither saved nor trained while the layer is merged
        object.__setattr__(self, "_before_merge", self.frozen)
        self.base_layer = merged
        self.merged_adapters.extend(adapters)

    def unmerge(self) -> None:
        """Put the base back; nothing was lost."""
        if not self.merged or self._before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        here = next(t.device for t in (*self.base_layer.parameters(), *self.base_layer.buffers()))
        frozen = self._before_merge.to(here)
        object.__setattr__(self, "_before_merge", None)
        self.base_layer = frozen
        self.merged_adapters.clear()
