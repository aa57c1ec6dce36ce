"""What is left of the base under an adapter where it was dropped."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from peft.utils.integrations import skip_init_on_device
from torch import nn

from ..common.fingerprint import VERSION
from ..common.frozen import FrozenWeight
from ..common.parallel import refuse_data_parallel
from ..common.staying import StaysHere


class DroppedBase(StaysHere):
    """What stays of a layer whose base codes were dropped (`keep_base=False`): its shape, dtype and bias."""

    bias: nn.Parameter | None
    experts = 1

    @skip_init_on_device  # PEFT's low_cpu_mem_usage puts new parameters on the meta device; the bias is the model's own
    def __init__(self, frozen: FrozenWeight) -> None:
        super().__init__()
        self.out_features, self.in_features = frozen.out_features, frozen.in_features
        self.compute_dtype, self.transposed, self.grid = frozen.compute_dtype, frozen.transposed, frozen.grid
        self.scale_dtype, self.source_checksum = frozen.scale_dtype, frozen.source_checksum
        self.quantized_before = frozen.quantized_before
        self._checksums = {version: frozen.checksum(version) for version in (1, VERSION)}
        self.register_parameter("bias", frozen.bias)
        self.register_buffer("where", torch.empty(0, device=frozen.device), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.where.device  # type: ignore[return-value]  # torch types buffers as Tensor | Module

    def checksum(self, version: int = VERSION) -> torch.Tensor:
        """The checksum of the base that was dropped (`FrozenWeight.checksum`)."""
        return self._checksums[version]

    _replicate_for_data_parallel = refuse_data_parallel

    def _apply(self, fn: Any, recurse: bool = True) -> DroppedBase:
        # the dtype of what is built from the integers follows `model.to(dtype)`, as a float weight would
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.device)).dtype
        return super()._apply(fn, recurse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.refuse()

    def refuse(self) -> NoReturn:
        """Raise ValueError, because somebody needs the base."""
        raise ValueError(
            "`keep_base=False` dropped the base codes, so there is nothing to compute without the adapter: it cannot "
            "be disabled (as TRL does it for a reference), unloaded or left out of a batch. Adapt the model with "
            "`keep_base=True` for that."
        )
