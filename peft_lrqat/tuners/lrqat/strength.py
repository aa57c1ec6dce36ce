"""LoRA's factor on an adapter (`lora_alpha / r`, `set_scale`) where it has rank 0, and so nothing to multiply.

The factor is on c lora_B lora_A, never on learned scales. Of an adapter without any low-rank factors nothing would
change, and PEFT would not notice. Where other layers of it have some, the factor is on those.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer


class Strength(LoraLayer):
    """Stands before PEFT's LoraLayer, whose methods would divide by the rank 0."""

    adapter_options: dict[str, Any]
    _scaling: dict[str, Any]

    @property
    def scaling(self) -> Any:
        """Adapter -> lora_alpha / r; 1 at rank 0.

        Setting it raises a ValueError if that is to change for an adapter without low-rank factors.
        """
        return self._scaling

    @scaling.setter
    def scaling(self, value: dict[str, Any]) -> None:
        for adapter, factor in value.items():
            self._check_strength(adapter, factor)
        self._scaling = value  # of another name, for `torch.compile`: some versions take vars() for attributes

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply lora_alpha / r of an adapter by a number, as PEFT does.

        Raises:
            ValueError: the adapter has no low-rank factors, and the number is not 1.
        """
        self._check_strength(adapter, scale)
        if self.r.get(adapter):
            super().set_scale(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        """See `set_scale`; of the active adapters."""
        for adapter in self.active_adapters:
            self._check_strength(adapter, scale)
        super().scale_layer(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """See `set_scale`; of the active adapters. None: back to lora_alpha / r."""
        for adapter in self.active_adapters:
            if scale is None:
                self.set_scale(adapter, 1)
            else:
                self._check_strength(adapter, scale)
        if scale is not None:
            super().unscale_layer(scale)

    def _check_strength(self, adapter: str, factor: Any) -> None:
        if factor == 1 or self.r.get(adapter) != 0 or self.adapter_options[adapter].has_factors:
            return
        raise ValueError(
            f"Adapter {adapter!r} has rank 0, so there are no low-rank factors whose product could be multiplied by "
            f"{factor} (`set_scale`, `rescale_adapter_scale`), and there is no such factor on learned scales. For a "
            f"share of their change make another adapter: `model.add_weighted_adapter([{adapter!r}], [{factor}], "
            "'name')`."
        )
