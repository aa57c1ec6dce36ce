"""The downcast, frozen base of an adapted layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Self

import torch
from peft.utils.integrations import skip_init_on_device
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...chunks import row_chunks
from ...grid import Grid, GridTensor, dequantize, grouped, quantize, rows_of, snap_scale, sum_per_scale
from ...modules.generation import KeepsWeight, Slot
from ...modules.packed import QuantizedLinear, merged_layer
from ...ops import quantized_linear
from ...ops.activations import Activations
from ...ops.inputs import linear_input
from ...ops.latent import places_of
from ...ops.linear import linear_weight
from ...ops.shared_inputs import round_shared
from ...ops.static_inputs import LearnedScale
from ...ops.stored_base import BaseFormat, decode_base, encode_base, from_eight_bits, to_eight_bits
from ...ranges import choose_range
from ...read_only import ReadOnlyTensor
from .fingerprint import VERSION, codes_checksum, float_checksum, position_weighted_sum
from .offload import Offloadable
from .packed_parameter import PackedParameter, packs_state_dicts, take_note
from .parallel import refuse_data_parallel

_WHY_READ_ONLY = (
    "The base of this layer is frozen integers, of which this weight is built for reading. Change the float model "
    "before it is adapted."
)


class FrozenWeight(Offloadable, KeepsWeight):
    """W0 in grid steps, downcast: what LR-QAT keeps of an nn.Linear (LR-QAT eq. 6 and 7).

    `of_floats` rounds a float layer; `of_codes` takes the codes, scales and zero points of one that was quantized
    before, which every downcast holds exactly.

    Everything is stored in *integer* parameters: they are frozen by nature, FSDP2 shards them, and no `.to(dtype)`,
    `.half()` or mixed-precision policy can change a bit of them.

    Parameters:
        base: (out, words), see `ops.stored_base.encode_base`.
        scale0_bits: int32 (rows, groups), the bit patterns of the fp32 scales s0 (weight units per grid step).
        zero_point: int8 (rows, groups) or None, grid steps.
        bias: (out,) or None, as in the original layer.

    Attributes:
        grid, downcast, scale_dtype: of the codes; one of `DOWNCASTS`; in what the scales that are stored are exact.
        compute_dtype: of the weights that are built of it: that of the model, also after `model.to(dtype)`.
        transposed: whether the layer was a Conv1D, whose weight is (in, out).
        ranges: see `__init__`.
        source_checksum: of the weight that it was made from, see `fingerprint.py`; None where that was not finite.
        lossless: how many scales gave all their weights back when a float weight was rounded, and of how many.
        places: int8 (out, in), where between the levels the float weights lay (`ops/latent.py`), for the first adapter
            to take; None where it has, or takes none.
        fixed_point: whether that was a layer of 8-bit codes that are fixed-point numbers in steps of `grid`.
        container_bits: how wide the codes of that layer were stored, if it was quantized.
        activations: how that layer rounded its input; None: not at all.
    """

    bias: nn.Parameter | None
    out_features: int
    in_features: int
    source_checksum: int | None
    lossless: tuple[int, int] | None = None
    places: torch.Tensor | None = None
    replaced: bool = False  # whether new float weights were converted since an adapter's file was last written
    experts: int = 1  # of how many experts of a mixture it is a projection (`lrqat/experts.py`)
    loading: bool = False  # while transformers loads the model, which asks for weights without reading them

    #: The attributes that describe the base.
    description = Offloadable.description | frozenset(
        {"downcast", "scale_dtype", "ranges", "transposed", "fixed_point", "container_bits", "activations", "fmt"}
        | {"source_checksum", "lossless", "places", "loading", "experts", "replaced"}
    )

    def __init__(
        self,
        shape: tuple[int, int],
        grid: Grid,
        downcast: str,
        scale_dtype: str,
        compute_dtype: torch.dtype,
        ranges: tuple[str, float, bool, float] | None = None,
        transposed: bool = False,
    ) -> None:
        """A description without tensors; `of_floats` and `of_codes` make a base.

        Args:
            shape: (out, in).
            ranges: method and exponent by which the scales of a float weight are chosen, whether they have signs, and
                their headroom; None: it was quantized before.
        """
        super().__init__()
        self.out_features, self.in_features = shape
        self.grid, self.downcast, self.scale_dtype, self.transposed = grid, downcast, scale_dtype, transposed
        self.compute_dtype, self.ranges = compute_dtype, ranges
        self.fixed_point, self.container_bits = False, grid.code_bits
        self.activations: Activations | None = None
        self.fmt = BaseFormat(grid.code_bits, self.in_features, downcast)

    @classmethod
    def of(
        cls, layer: Any, config: Any, *, fixed_point: bool = False, source_checksum: int | None = None
    ) -> FrozenWeight:
        """The base of a layer as a configuration of either method wants it.

        Args:
            layer: float, quantized before, or a base already, whose tensors are shared then.
            fixed_point: see `of_codes`.
            source_checksum: see `of_floats` and `of_codes`.
        """
        grid, downcast, scale_dtype = config.grid, config.kept_as, config.scale_dtype
        if isinstance(layer, FrozenWeight):
            frozen = layer._again()
        elif isinstance(layer, QuantizedLinear):
            frozen = cls.of_codes(
                layer, grid, downcast, scale_dtype, fixed_point=fixed_point, source_checksum=source_checksum
            )
        else:
            frozen = cls._of_layer(layer, config, source_checksum)
        if config.offload_base and not isinstance(layer, nn.Embedding):  # which looks up rows
            frozen.offload()
        return frozen

    @classmethod
    def _of_layer(cls, layer: Any, config: Any, source_checksum: int | None) -> FrozenWeight:
        method, p, signed, headroom = config.ranges
        return cls.of_floats(
            layer,
            config.grid,
            config.kept_as,
            method,
            p,
            config.scale_dtype,
            signed_scales=signed,
            headroom=headroom,
            transposed=isinstance(layer, Conv1D),
            convert_on=config.conversion_device(),
            source_checksum=source_checksum,
            keep_places=config.keeps_places,
        )

    @classmethod
    @skip_init_on_device  # PEFT's low_cpu_mem_usage puts new parameters on the meta device; these are the model's own
    def of_floats(
        cls,
        layer: Any,
        grid: Grid,
        downcast: str,
        range_method: str = "lp",
        range_p: float = 2.5,
        scale_dtype: str = "auto",
        *,
        signed_scales: bool = False,
        headroom: float = 1.0,
        transposed: bool = False,
        convert_on: torch.device | None = None,
        source_checksum: int | None = None,
        keep_places: bool = False,
    ) -> FrozenWeight:
        """The base of a layer with a float `weight`, (out, in), or (in, out) if `transposed` (GPT-2's Conv1D).

        Args:
            headroom: a factor on the chosen scales.
            convert_on: the device on which the weight is converted. The result is the same on every device, and moves
                to the layer's device. None: that device.
            source_checksum: `float_checksum` of the weight, if it is known.
            keep_places: whether to keep `places`, a byte a weight, of a symmetric grid.
        """
        weight = layer.weight.detach()
        weight = weight.t() if transposed else weight
        out_features, in_features = weight.shape
        ranges = (range_method, range_p, signed_scales, headroom)
        frozen = cls((out_features, in_features), grid, downcast, scale_dtype, weight.dtype, ranges, transposed)
        there = weight if convert_on is None else weight.to(convert_on)
        base, scale, zero_point = frozen._convert(there)
        frozen.places = places_of(there, scale, grid).to(weight.device) if keep_places else None
        zero_point = None if zero_point is None else zero_point.to(weight.device)
        frozen._hold(base.to(weight.device), scale.to(weight.device), zero_point, getattr(layer, "bias", None))
        frozen.source_checksum = float_checksum(there) if source_checksum is None else source_checksum
        return frozen

    @classmethod
    @skip_init_on_device
    def of_codes(
        cls,
        layer: QuantizedLinear,
        grid: Grid,
        downcast: str,
        scale_dtype: str,
        *,
        fixed_point: bool = False,
        source_checksum: int | None = None,
    ) -> FrozenWeight:
        """The base of a layer that was quantized before, whose codes lie on `grid`; they are taken as they are.

        Args:
            fixed_point: the 8-bit codes are fixed-point numbers in steps of `grid` (fx8), and are taken as such.
            source_checksum: `codes_checksum` of the layer, if it is known.
        """
        weight = layer.grid_tensor()
        frozen = cls((layer.out_features, layer.in_features), grid, downcast, scale_dtype, layer.compute_dtype)
        frozen.fixed_point, frozen.container_bits = fixed_point, layer.bits
        frozen.activations = layer.activations
        codes, scale, zero_point = weight.codes, weight.scale, weight.zero_point
        if fixed_point:
            codes, scale, zero_point = from_eight_bits(weight, frozen.fmt.bits)
        stored, parts = frozen.fmt._replace(downcast="fx8"), []
        with torch.no_grad():
            for rows in row_chunks(frozen.out_features, frozen.in_features, codes.device):
                levels = decode_base(codes[rows], stored) if fixed_point else codes[rows].float()
                parts.append(encode_base(levels, stored.bits, downcast))
        frozen._hold(torch.cat(parts), snap_scale(scale, scale_dtype), zero_point, layer.bias)
        frozen.source_checksum = codes_checksum(weight) if source_checksum is None else source_checksum
        return frozen

    @skip_init_on_device
    def _again(self) -> FrozenWeight:
        """The same base, over the same tensors, without what users have hung on the module: of one that was made of
        floats while they were loaded (`loading.py`)."""
        shape = (self.out_features, self.in_features)
        ours = (self.grid, self.downcast, self.scale_dtype, self.compute_dtype, self.ranges, self.transposed)
        again = type(self)(shape, *ours)
        again._hold(self.base.data, self.scale0_bits.data, None, self.bias)
        again.register_parameter("zero_point", self.zero_point)
        again.source_checksum, again.lossless, again.places = self.source_checksum, self.lossless, self.places
        again._device, again.experts = self._device, self.experts
        if self.offloaded:
            again.offload()
        return again

    @property
    def quantized_before(self) -> bool:
        """Whether the codes are those of a layer that was quantized already, and stand for it exactly."""
        return self.ranges is None

    def _hold(
        self, base: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bias: nn.Parameter | None
    ) -> None:
        self.base = PackedParameter(base)
        self.scale0_bits = PackedParameter(scale.view(torch.int32))
        self.register_parameter("zero_point", None if zero_point is None else PackedParameter(zero_point))
        self.register_parameter("bias", bias)
        take_note(self)

    @torch.no_grad()
    def _convert(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(base, s0, zero point) of a float (out, in) weight, a row chunk at a time."""
        assert self.ranges is not None
        method, p, signed, headroom = self.ranges
        scale, zero_point = choose_range(weight, self.grid, method, p, self.scale_dtype, signed)
        if headroom != 1:
            scale = snap_scale(scale * headroom, self.scale_dtype)
        parts, changed = [], torch.zeros(scale.shape, dtype=torch.int64, device=weight.device)
        for rows in row_chunks(self.out_features, self.in_features, weight.device):
            s, z = rows_of(scale, rows), rows_of(zero_point, rows)
            here = weight[rows].contiguous()
            differs = dequantize(quantize(here, s, z, self.grid), s, z, weight.dtype) != here
            rows_of(changed, rows).add_(sum_per_scale(differs, s))
            levels = grouped(here.float(), scale) / s.unsqueeze(-1)
            if z is not None:
                levels += z.unsqueeze(-1)
            if self.grid.ternary:  # two-bit codes, of which -2 is not used
                levels.clamp_(self.grid.qmin, self.grid.qmax)
            parts.append(encode_base(levels.view(-1, self.in_features), self.fmt.bits, self.downcast))
        self.lossless = int((changed == 0).sum()), changed.numel()
        return torch.cat(parts), scale, zero_point

    def slot(self) -> Slot | None:
        return None if self.offloaded else super().slot()  # there is no room for weights

    @property
    def weight(self) -> torch.Tensor:
        """The base rounded to its grid, as `dense` builds it; read-only."""
        if self.loading:  # transformers' models initialize what has not this mark
            shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
            marked = torch.empty(shape, dtype=self.compute_dtype, device="meta")
            marked._is_hf_initialized = True  # type: ignore[attr-defined]
            return marked
        return ReadOnlyTensor(self.dense(), _WHY_READ_ONLY)

    def dense(self) -> torch.Tensor:
        """Build the base rounded to its grid, in the original dtype and orientation: the model at step 0."""
        weight = self.built()
        return weight.t() if self.transposed else weight

    def built(
        self,
        shift: torch.Tensor | None = None,
        A: torch.Tensor | None = None,
        B: torch.Tensor | None = None,
        c: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Build W^, (out, in), with an adapter inside the rounding: see `ops.quantized_linear`.

        Args:
            dtype: of the result; None: the original layer's.
        """
        constants = (c, self.fmt.bits, self.downcast, self.scale_dtype, self.in_features, dtype or self.compute_dtype)
        base, scale0, zero_point = self.stored()
        return linear_weight(base, scale0, shift, zero_point, A, B, *constants)

    def float_layer(self) -> nn.Module:
        """The base at step 0 as the kind of float layer that it was made from."""
        layer: nn.Module
        if self.transposed:
            layer = Conv1D(self.out_features, 0)
        else:
            layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.register_parameter("weight", nn.Parameter(self.dense().contiguous(), requires_grad=False))
        layer.register_parameter("bias", self.bias)
        return layer

    @torch.no_grad()
    def quantized_layer(self) -> nn.Module:
        """The layer that `of_codes` took (with its fraction rounded away, if the base is kept as integers)."""
        base, scale, zero_point = self.here(self.base), self.scale0, self.here(self.zero_point)
        bits = self.container_bits
        if self.fixed_point and self.downcast == "fx8":
            weight = to_eight_bits(base.detach(), scale, zero_point, self.grid)
        else:
            weight = GridTensor(decode_base(base, self.fmt).round_().to(torch.int8), scale, zero_point, self.grid)
            bits = self.fmt.bits if self.fixed_point else bits
        return merged_layer(
            weight, self.bias, bits, self.compute_dtype, experts=self.experts, activations=self.activations
        )

    def checksum(self, version: int = VERSION) -> torch.Tensor:
        """int64 scalar that tells two conversions apart: a position-weighted sum of every stored byte, modulo 2^64."""
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for index, tensor in enumerate((self.base, self.scale0_bits, self.zero_point)):
            if tensor is not None:
                stored = self.here(tensor.detach()).contiguous()
                stored = stored.view(torch.uint8).reshape(stored.shape[0], -1)
                # a salt for each, or bytes of one could make up for those of another
                total += position_weighted_sum(stored, 40503 * (index + 1), version)
        return total

    _replicate_for_data_parallel = refuse_data_parallel

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # the dtype of what is built from the integers follows `model.to(dtype)`, as a float weight would
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.device)).dtype
        self.places = None if self.places is None else fn(self.places)
        return super()._apply(fn, recurse)

    def product(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        shift: torch.Tensor | None = None,
        A: torch.Tensor | None = None,
        B: torch.Tensor | None = None,
        c: float = 1.0,
        values: torch.Tensor | None = None,
        learned: LearnedScale | None = None,
    ) -> torch.Tensor:
        """x W^T + bias with an adapter inside the rounding: see `ops.quantized_linear`."""
        base, scale0, zero_point = self.stored()
        weight = (base, scale0, shift, zero_point, A, B)
        constants = (c, self.fmt.bits, self.downcast, self.scale_dtype)
        return quantized_linear(x, *weight, bias, *constants, values, learned)

    def kept_weight(
        self,
        dtype: torch.dtype,
        slot: Slot,
        sources: Iterable[torch.Tensor] = (),
        key: Hashable = None,
        operands: Callable[[], tuple[Any, Any, Any, float]] = lambda: (None, None, None, 1.0),
    ) -> torch.Tensor | None:
        """The weight of `product`, (out, in) in `dtype`; None where it may not be kept.

        Args:
            slot: the layer's own.
            sources, key: what the adapters are, tensors and others.
            operands: makes of them what `product` takes: shift, A, B and c.
        """
        stored = (self.base, self.scale0_bits, self.zero_point)
        return slot.get(dtype, (*stored, *sources), lambda: self.built(*operands(), dtype=dtype), key)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer at step 0: x (..., in) to (..., out)."""
        x = linear_input(x, self) if self.activations is None else round_shared(x, self.activations, self)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        slot = self.slot()
        if slot is not None and (weight := self.kept_weight(x.dtype, slot)) is not None:
            return nn.functional.linear(x, weight, bias)
        return self.product(x, bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"grid=({self.grid.describe()}), downcast={self.downcast}"
        )

    # State dicts. PEFT's functions for base models, and anybody's `load_state_dict`, speak of a float `weight`. Saving
    # an adapter also calls `state_dict()` on the whole model, and must not build every float weight on the way.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if packs_state_dicts() or self.loading:
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.dense()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def shows(self, weight: torch.Tensor) -> bool:
        """Whether this is the weight that a state dict of the layer has. It leaves the base as it is, which may hold
        fractions of grid steps that no such weight has.
        """
        return torch.equal(weight.to(self.device, self.compute_dtype), self.dense())

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            return super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, unexpected, errors
            )
        shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        if tuple(weight.shape) != shape:
            errors.append(f"size mismatch for {prefix}weight: {tuple(weight.shape)} for {self!r}.")
            return
        if not self.shows(weight):
            weight = (weight.t() if self.transposed else weight).to(self.device, self.compute_dtype)
            if self.quantized_before:
                errors.append(f"{prefix}weight is another than the quantized one that {self!r} was made from.")
                return
            base, scale, zero_point = self._convert(weight)
            self.source_checksum = float_checksum(weight)
            with torch.no_grad():  # not through `.data`, which hides it from who has a copy
                self.base.copy_(base)
                self.scale0_bits.copy_(scale.view(torch.int32))
                if zero_point is not None and self.zero_point is not None:
                    self.zero_point.copy_(zero_point)
            take_note(self)
            self.replaced = True
        if self.bias is not None and prefix + "bias" in state_dict:
            self.bias.data.copy_(state_dict[prefix + "bias"])
