"""LoRA's factor on an adapter (`lora_alpha / r`, `set_scale`), which integers do not have.

PEFT sets and multiplies it, and would not notice that nobody reads it.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, NoReturn


class Unscaled:
    """Stands before PEFT's LoraLayer: a layer whose adapters have no factor, where changing it is an error."""

    @property
    def scaling(self) -> Any:
        """Empty: there is no factor on an adapter. Setting it raises a ValueError, as the methods do that set it."""
        return MappingProxyType({})

    @scaling.setter
    def scaling(self, value: Any) -> None:
        if "_without_scaling" in vars(self):  # LoraLayer's __init__ sets it once
            _refuse_scaling()
        vars(self)["_without_scaling"] = True

    def set_scale(self, adapter: str, scale: float) -> None:
        """Refused, but for 1: integers have no strength.

        Raises:
            ValueError: `scale` is another number.
        """
        if scale != 1:
            _refuse_scaling()

    def scale_layer(self, scale: float) -> None:
        """See `set_scale`."""
        self.set_scale("", scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """See `set_scale`."""
        self.set_scale("", 1 if scale is None else scale)


def _refuse_scaling() -> NoReturn:
    raise ValueError(
        "An adapter of low-bit SR is the integers of the weights themselves, on which there is no factor (`set_scale`, "
        "`rescale_adapter_scale`): what lies between it and the base would have to be rounded a second time. Use it as "
        "it is, or LRQATConfig, whose adapters can be scaled."
    )
