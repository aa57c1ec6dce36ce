"""The experts of a mixture with an adapter for each of them inside the rounding.

One layer for one projection of all experts, as `modules.experts.Experts` asks for it: it does not multiply, but builds
the weights W^ of the experts that tokens were sent to. Each is what `LRQATLinear` makes of that expert alone, bit for
bit. The factors of all experts lie in one lora_A and one lora_B, as in PEFT's `ParamWrapper`:

    lora_A.weight (E r, in) = (E, r, in)        lora_B.weight (out, r E) = (out, r, E)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ...modules.experts import Built, ExpertStack, Grouped
from ...ops.experts import expert_linear, expert_weights
from ...ops.reference import adapter_units, codes
from ...ops.reference_experts import Stack
from ..common.frozen import FrozenWeight
from .config import LRQATConfig
from .layer import LRQATLinear


class FrozenExperts(FrozenWeight):
    """W0 of all experts, as `FrozenWeight` keeps a weight of (experts * out, in), and the weights of some of them.

    Attributes:
        experts: how many; expert e has the rows e * out to (e + 1) * out.
    """

    @classmethod
    def of(cls, layer: Any, config: Any, **kwargs: Any) -> FrozenExperts:
        frozen = super().of(layer, config, **kwargs)
        assert isinstance(frozen, FrozenExperts)
        frozen.experts = layer.experts
        return frozen

    def some(
        self,
        experts: torch.Tensor | None,
        dtype: torch.dtype,
        shift: torch.Tensor | None = None,
        A: torch.Tensor | None = None,
        B: torch.Tensor | None = None,
        c: float = 1.0,
    ) -> torch.Tensor:
        """W^ of some experts (None: of all), (n, out, in), differentiable: see `ops.experts.expert_weights`."""
        bits, downcast, kept = self.fmt.bits, self.downcast, self.scale_dtype
        constants = (c, bits, downcast, kept, self.in_features, dtype)
        base, scale0, zero_point = self.stored()
        stack = (base, scale0, shift, zero_point, A, B)
        return expert_weights(*stack, experts, self.experts, *constants)

    def grouped(
        self,
        dtype: torch.dtype,
        shift: torch.Tensor | None = None,
        A: torch.Tensor | None = None,
        B: torch.Tensor | None = None,
        c: float = 1.0,
    ) -> Grouped:
        """The product with W^ of all experts, which exists for a part of them at a time: see `ops.expert_linear`."""
        base, scale0, zero_point = self.stored()
        stack = (base, scale0, shift, zero_point, A, B)
        constants = (c, self.fmt.bits, self.downcast, self.scale_dtype)
        return Grouped(lambda x, ends: expert_linear(x, ends, *stack, *constants), dtype, self.device)

    def built(self, *operands: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """All of them as one matrix, (experts * out, in), without a graph."""
        with torch.no_grad():
            return self.some(None, dtype or self.compute_dtype, *operands).flatten(0, 1)

    def float_layer(self) -> nn.Module:
        return ExpertStack(nn.Parameter(self.dense().view(self.experts, -1, self.in_features), requires_grad=False))

    def weights(self, experts: torch.Tensor | None, dtype: torch.dtype, *operands: Any) -> Built:
        """W^ of some experts, and how to build it again: see `modules.experts.Experts`.

        Args:
            operands: shift, A, B and c, as `some` takes them.
        """
        listed = torch.arange(self.experts, device=self.device) if experts is None else experts
        held: list[Any] = [t.detach() if isinstance(t, torch.Tensor) else t for t in operands]

        def again(which: slice) -> torch.Tensor:
            with torch.no_grad():
                return self.some(listed[which], dtype, *held)

        return Built(self.some(experts, dtype, *operands), again)

    def forward(self, experts: torch.Tensor | None, dtype: torch.dtype) -> Built:  # type: ignore[override]
        """The experts at step 0."""
        return self.weights(experts, dtype)

    def kept(self, dtype: torch.dtype) -> torch.Tensor | None:
        """None: without an adapter it keeps no weights."""
        return None

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not prefix.endswith("base_layer.") and prefix + "weight" in destination:  # as transformers calls it
            destination[prefix[:-1]] = destination.pop(prefix + "weight").view(self.experts, -1, self.in_features)


class LRQATExpertLinear(LRQATLinear):
    """One projection of all experts, whose weights are rounded with the adapters inside."""

    base_layer: FrozenExperts
    frozen_class = FrozenExperts

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features // module.experts

    @property
    def experts(self) -> int:
        """How many."""
        return self.frozen.experts

    def _add_factors(self, adapter_name: str, r: int, lora_alpha: int, config: LRQATConfig, **kwargs: Any) -> None:
        super()._add_factors(adapter_name, r * self.experts, lora_alpha, config, **kwargs)
        self.r[adapter_name] = r
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """c lora_B lora_A before the rounding, of each expert: (experts, out, in), in the adapter's unit."""
        if not self.r[adapter]:
            return super().get_delta_weight(adapter).view(self.experts, -1, self.frozen.in_features)
        A, B = self.lora_A[adapter].weight.float(), self.lora_B[adapter].weight.float()
        A, B = A.view(self.experts, -1, A.shape[1]), B.view(B.shape[0], -1, self.experts)
        return torch.einsum("ore,eri->eoi", B, A) * self.scaling[adapter]

    def _side_by_side(self, A: list[torch.Tensor], B: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        ranks_A = torch.cat([a.view(self.experts, -1, a.shape[1]) for a in A], 1)
        ranks_B = torch.cat([b.view(b.shape[0], -1, self.experts) for b in B], 1)
        return ranks_A.flatten(0, 1), ranks_B.flatten(1)

    @property
    def weight(self) -> torch.Tensor:
        """W^ of all experts with the active adapters, (experts, out, in), in the model's dtype; differentiable."""
        return self.forward(None, self.frozen.compute_dtype).weight

    # -- what `Experts` asks for

    def forward(self, experts: torch.Tensor | None, dtype: torch.dtype, **kwargs: Any) -> Built:  # type: ignore[override]
        """W^ of some experts, with the active adapters inside the rounding.

        Args:
            experts: int64 (n,); None: all.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "`adapter_names` gives each sample of a batch an adapter of its own, but the experts of a mixture see "
                "tokens, not samples. Call the model once for each adapter."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged:
            return self.base_layer(experts, dtype)
        return self.base_layer.weights(experts, dtype, *self._operands(self._adapters_used()))

    def grouped(self, dtype: torch.dtype) -> Grouped | None:
        """W^ of all experts as a factor in grouped products, where it need not be built; None while merged."""
        if self.merged:
            return None
        return self.base_layer.grouped(dtype, *self._operands(self._adapters_used()))

    def kept(self, dtype: torch.dtype) -> torch.Tensor | None:
        """W^ of all experts, where the layer keeps it: while the model generates."""
        if self.merged and not self.disable_adapters:
            return self.base_layer.kept(dtype)  # a QuantizedStack
        weight = None if self.merged else self._kept_weight(dtype, self._adapters_used())
        return None if weight is None else weight.view(self.experts, -1, self.frozen.in_features)

    def _adapters_used(self) -> list[str]:
        return [] if self.disable_adapters else self.active_adapters

    # -- merging

    @torch.no_grad()
    def sample_codes(self, rows: torch.Tensor, adapters: list[str]) -> tuple[torch.Tensor, int, int] | None:
        frozen, (shift, A, B, c) = self.frozen, self._operands(adapters)
        if shift is None and B is None:
            return None
        stack = Stack(frozen.here(frozen.base), frozen.scale0, shift, None, A, B)
        out, fmt = frozen.out_features // self.experts, frozen.fmt
        some = torch.empty(len(rows), frozen.in_features, dtype=torch.int8, device=rows.device)
        for e in torch.unique(rows // out).tolist():
            one, here = stack.expert(e, self.experts), rows // out == e
            inner, units = rows[here] - e * out, adapter_units(one.scale0, one.shift)
            B_rows, units = None if one.B is None else one.B[inner], None if units is None else units[inner]
            some[here] = codes(one.base[inner], one.A, B_rows, fmt, c, units)
        return some, fmt.qmin, fmt.qmax

    def _levels(
        self, shift: torch.Tensor | None, A: torch.Tensor | None, B: torch.Tensor | None, c: float
    ) -> torch.Tensor:
        frozen, parts = self.frozen, []
        stack = Stack(frozen.here(frozen.base), frozen.scale0, shift, None, A, B)
        for e in range(self.experts):
            one = stack.expert(e, self.experts)
            parts.append(codes(one.base, one.A, one.B, frozen.fmt, c, adapter_units(one.scale0, one.shift)))
        return torch.cat(parts)
