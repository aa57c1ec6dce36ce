"""The adapted layer of low-bit SR.

An adapter is a set of integer codes of its own, over a base that was rounded to the same grid:

    base      q0 = round(W0 / s0)           frozen, packed, shared by all adapters (none with `keep_base=False`)
    adapter   q, s0                         q starts at q0; packed, and *the trainable parameter* (`tensor.py`)

    W^ = s q          s = s0, or, with learned scales, snap(s0 (1 + shift))
    y  = x^ W^T + b   x^ = x, or x rounded per token (`act_bits`)

so `disable_adapter` is the base, several adapters lie side by side, and saving an adapter saves its codes. They do not
add up as LoRA's do (the sum of two codes is on no grid), so one adapter of a layer is active at a time.

The gradient. The parameter's value is s0 q, its gradient the dense dL/d(s0 q) = (s / s0) dY^T X, without any
straight-through estimator. A learned scale is a factor beside the parameter: `lowbitsr_scale_shift`, a relative change
that starts at 0, as in LR-QAT; its gradient sums G q over the weights that share it. X, packed codes and scales are
kept for backward; W^ is built for each product and dropped.

`forward_bits=1.58`: the n-bit codes are trained, but the forward, the served checkpoint and the loss use

    t_s = snap(s0 mean|q| (1 + shift)),   t = clip(round(s q / t_s), -1, 1),   W^ = t_s t

(BitNet b1.58's absmean), and the gradient passes straight through from W^ to the codes (DQT's "ternary inference").

With BitNet's checkpoint format the one scale multiplies the output instead of the weight, as transformers' own layer
does; then what is trained is what is served, to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import skip_init_on_device
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...grid import GridTensor, dequantize, snap_scale
from ...modules.generation import KeepsWeight, Slot
from ...modules.packed import QuantizedLinear
from ...ops import trained_scale
from ...ops.activations import Activations
from ...ops.dispatch import cast
from ...ops.inputs import linear_input
from ...ops.low_bit import low_bit_levels, low_bit_linear, low_bit_weight, mean_code
from ...ops.shared_inputs import through_rounding
from ...packing import unpack
from ...rounding import stream_key
from ..common.frozen import FrozenWeight
from ..common.input_scale import AdapterWeight
from ..common.layer import MergingLayer, check_method, parameters_become_meta
from ..common.packed_parameter import weight_of
from ..common.readable import readable_weight, refuse_rounded_inputs
from .config import LowBitSRConfig
from .dropped import DroppedBase
from .parts import PARTS, LowBitWeight, PartView
from .tensor import LowBitTensor
from .unscaled import Unscaled


class LowBitSRLayer(Unscaled, MergingLayer):
    """What `get_peft_model` puts in the place of a linear layer for low-bit SR: an adapter is a set of codes of its
    own.

    Attributes:
        base_layer (FrozenWeight): the base, rounded to the grid and packed; while an adapter is merged, the layer that
            the checkpoint will hold.
        lowbitsr_weight (nn.ModuleDict): adapter -> LowBitWeight, whose `weight` is a `LowBitTensor` (out, in): the
            trained codes, which read as s q in fp32.
        lowbitsr_scale_shift (nn.ModuleDict): adapter -> AdapterWeight, fp32 (rows, groups), the relative change of the
            scales. Entries exist with `learn_scales=True` only.
        lowbitsr_act_scale (nn.ModuleDict): adapter -> InputScale, fp32 (1,), log2 of the fixed scale of inputs.
            Entries exist with `act_scale="static"` only.
        weight (torch.Tensor): float (out, in), the weight that the forward multiplies with, built anew whenever it is
            read.

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_lrqat import LowBitSRConfig, LowBitSRLayer
        >>> model = get_peft_model(base, LowBitSRConfig(bits=4))
        >>> layers = [module for module in model.modules() if isinstance(module, LowBitSRLayer)]
        >>> codes = layers[0].lowbitsr_weight["default"].weight.packed  # 8 codes in a word
        >>> codes.dtype
        torch.int32
    """

    lowbitsr_weight: Any  # nn.ModuleDict; torch types what is inside as Tensor | Module
    lowbitsr_scale_shift: Any
    lowbitsr_act_scale: Any

    adapter_layer_names = ("lowbitsr_weight", "lowbitsr_scale_shift", "lowbitsr_act_scale")
    # lora_A: `_note_without_factors`
    other_param_names = (*MergingLayer.other_param_names, "adapter_activations", "lora_A")

    @property
    def act_scales(self) -> Any:
        """`lowbitsr_act_scale`."""
        return self.lowbitsr_act_scale


class LowBitSRLinear(nn.Module, LowBitSRLayer, KeepsWeight):
    """An nn.Linear or Conv1D whose weight is trained as integers."""

    base_layer: FrozenWeight | DroppedBase

    def __init__(
        self,
        base_layer: nn.Linear | Conv1D | QuantizedLinear | FrozenWeight,
        adapter_name: str,
        config: LowBitSRConfig,
        name: str,
        source_checksum: int | None = None,
        fixed_point: bool = False,
        **kwargs: Any,
    ) -> None:
        """Convert `base_layer` and add the first adapter. Its float weight is not kept.

        Args:
            fixed_point: see `FrozenWeight.of_codes`.
            name: the module's name in the model, which (with the seed and the adapter's name) tells its random stream
                from the others'.
            source_checksum: of the layer's weight, if it is known.
        """
        super().__init__()
        frozen = FrozenWeight.of(base_layer, config, fixed_point=fixed_point, source_checksum=source_checksum)
        LowBitSRLayer.__init__(self, frozen, **kwargs)
        self.fan_in_fan_out = frozen.transposed
        self.name = name
        self.lowbitsr_weight = nn.ModuleDict({})
        for name_of_part, attribute in PARTS.items():
            self.add_module(name_of_part, PartView(self.lowbitsr_weight, attribute))
        self.lowbitsr_scale_shift = nn.ModuleDict({})
        self.lowbitsr_act_scale = nn.ModuleDict({})
        self.adapter_activations: dict[str, Activations | None] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, name=name)
        if not config.keep_base:
            self.base_layer = DroppedBase(frozen)

    # -- adapters

    def update_layer(  # type: ignore[override]  # there is no rank
        self, adapter_name: str, *args: Any, config: LowBitSRConfig, name: str = "", **kwargs: Any
    ) -> None:
        """Add an adapter, which starts at the base (PEFT's model calls this).

        Within PEFT's `low_cpu_mem_usage`, where the adapter's values are about to be loaded, it is made on the meta
        device; but not if it may begin where the float weights lay, because only codes tell whether those of the file
        are the base's.

        Raises:
            ValueError: the adapter is one of another method, or the base is gone.
        """
        check_method(config, LowBitSRConfig, adapter_name)
        frozen = self.frozen
        if isinstance(frozen, DroppedBase):
            raise ValueError(
                f"Adapter {adapter_name!r} would start at the base codes, which `keep_base=False` dropped. Adapt the "
                "float model with `keep_base=True` for several adapters."
            )
        waits = parameters_become_meta() and frozen.places is None
        self._add(adapter_name, frozen, config, name, "meta" if waits else frozen.device)
        self.adapter_options[adapter_name] = config
        self.adapter_activations[adapter_name] = config.activations_of(name)
        self._add_input_scale(adapter_name, config)
        self._note_without_factors(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @skip_init_on_device  # PEFT would move a tensor subclass to the meta device in a way that it cannot be
    def _add(
        self, adapter_name: str, frozen: FrozenWeight, config: LowBitSRConfig, name: str, device: torch.device | str
    ) -> None:
        stored = (frozen.base, frozen.scale0)
        if config.keep_base or not config.init_weights or device == "meta":
            packed, scale = (torch.empty_like(t, device=device).copy_(t.detach()) for t in stored)
        else:  # nobody reads the base again, so that its tensors need no copy
            packed, scale = (t.detach() for t in stored)
        # adapters of one layer round apart; one of PEFT's own name as before adapters had streams of their own
        named = name if adapter_name == "default" else f"{name}/{adapter_name}"
        stream = torch.tensor([stream_key(config.seed, named), 0], device=device)
        trained_before = bool(config.base_model_name_or_path)  # a model of transformers' from_config has no name
        weight = LowBitTensor(
            packed,
            scale,
            stream,
            config.grid,
            frozen.in_features,
            config.error_feedback,
            trained_before,
            bool(config.grow_scales),
        )
        if trained_before and config.init_weights and not (weight.is_meta or config.inference_mode):
            weight.places = frozen.places  # from scratch they are noise, of which training would rid itself later
        frozen.places = None
        if not config.init_weights and not weight.is_meta:
            # for tests: an adapter that moves most weights by a step or so
            weight.round_from(weight.to_float() + torch.randn(weight.shape, device=device) * scale.mean())
        self.lowbitsr_weight[adapter_name] = LowBitWeight(weight)
        if config.learn_scales:
            self.lowbitsr_scale_shift[adapter_name] = AdapterWeight(torch.zeros_like(scale))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter (or several of which this layer has one).

        Raises:
            ValueError: the layer has more than one of them.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._the_one(names)
        super().set_adapter(names, inference_mode=inference_mode)

    def _the_one(self, names: list[str]) -> str | None:
        """The one of these adapters that the layer has, or None; ValueError if it has several."""
        # every forward asks, and torch looks modules up in Python
        weights: Any = self._modules["lowbitsr_weight"]
        present = [name for name in names if name in weights._modules]
        if len(present) > 1:
            raise ValueError(
                f"The adapters {present} are sets of integers for the same layer, and the sum of two is on no grid. "
                "Activate (or merge) one of them; adapters of different layers may be active together."
            )
        return present[0] if present else None

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Compute how far training has moved the weight.

        Args:
            adapter (str): the adapter's name.

        Returns:
            fp32 (out, in), transposed for Conv1D, in weight units.
        """
        frozen = self._needed_base()
        scale, ternary, _ = self._scales(adapter)
        here = dequantize(*self._levels(adapter, scale, ternary), None, torch.float32)
        base = dequantize(unpack(frozen.base, frozen.fmt.bits, frozen.in_features), frozen.scale0, None, torch.float32)
        delta = here - base
        return delta.t() if self.fan_in_fan_out else delta

    def _needed_base(self) -> FrozenWeight:
        """The base, for what cannot do without: ValueError if it was dropped."""
        frozen = self.frozen
        if isinstance(frozen, DroppedBase):
            frozen.refuse()
        return frozen

    def _weight(self, adapter: str) -> Any:
        """The adapter's `LowBitTensor`."""
        return weight_of(self._modules["lowbitsr_weight"], adapter)

    def _scales(
        self, adapter: str, mean: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """s, the ternary projection's scale (or None), and s / s0 (or None where s is s0); fp32 (rows, groups).

        Args:
            mean: the `_mean_code` of the projection, where it is known.
        """
        weight = self._weight(adapter)
        shift = weight_of(self._modules["lowbitsr_scale_shift"], adapter)
        if weight.packed.is_meta or weight.scale.is_meta or (shift is not None and shift.is_meta):
            self._check_values([adapter])
        if shift is None and self.adapter_options[adapter].forward_bits is None:
            return weight.scale, None, None
        scale_dtype = self.frozen.scale_dtype
        scale, factor, ternary = weight.scale, None, None
        if shift is not None:
            # a copy: the optimizer may write to weight.scale (`rounding.poison`) while backward is still running
            scale = trained_scale(weight.scale.clone(), shift, scale_dtype)
            factor = (scale / weight.scale).detach()
        if self.adapter_options[adapter].forward_bits is not None:
            # positive: a ternary grid has no side to choose, and BitNet's format no sign
            start = weight.scale.abs() * (self._mean_code(weight) if mean is None else mean)
            ternary = snap_scale(start, scale_dtype) if shift is None else trained_scale(start, shift, scale_dtype)
        return scale, ternary, factor

    @staticmethod
    def _mean_code(weight: Any) -> torch.Tensor:
        """mean|q| of a `LowBitTensor`, fp32 (rows, groups): a pass over all codes."""
        return mean_code(weight.packed, *weight.scale.shape, weight.grid.code_bits, weight.shape[1])

    def _read(self, adapters: list[str]) -> torch.Tensor:
        adapter = self._the_one(adapters)
        if adapter is None:
            return readable_weight(self._needed_base().built(), self._needed_base().product)
        weight: Any = self.lowbitsr_weight[adapter].weight
        scale, ternary, factor = self._scales(adapter)

        def product(x: torch.Tensor, weight: Any, scale: torch.Tensor, ternary: torch.Tensor | None) -> torch.Tensor:
            refuse_rounded_inputs(self.adapter_activations[adapter])
            return low_bit_linear(x, weight, weight.packed, scale, ternary, factor, None, weight.grid.code_bits)

        with torch.no_grad():
            values = dequantize(*self._levels(adapter, scale, ternary), None, self.frozen.compute_dtype)
        return readable_weight(values, product, weight, scale, ternary)

    def _trained_scales(self, adapters: list[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
        name = next((name for name in adapters if name in self.lowbitsr_weight), None)
        weight: Any = None if name is None else self.lowbitsr_weight[name].weight
        if not hasattr(weight, "packed"):
            return None
        if name not in self.lowbitsr_scale_shift:
            return weight.scale, weight.scale
        return weight.scale, weight.scale * (1 + self.lowbitsr_scale_shift[name].weight.float())

    # -- forward

    forward = MergingLayer.forward  # nn.Module's, which raises, would come first

    def _run(self, x: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        adapter = self._the_one(adapters)
        if adapter is None:
            return self._needed_base()(x)
        weight = self._weight(adapter)
        options = self.adapter_options[adapter]
        if not hasattr(weight, "packed"):
            raise ValueError(
                "Something has replaced a low-bit weight by a float tensor, as FSDP does: sharding packed weights is "
                "not supported. Use data parallelism (DDP), or LR-QAT (`LRQATConfig`), whose packed base FSDP2 shards."
            )
        kind = x.device.type
        if (
            torch.is_autocast_enabled(kind)
            and torch.get_autocast_dtype(kind) == torch.float16
            and weight.requires_grad
            and torch.is_grad_enabled()
        ):
            raise ValueError(
                "Low-bit SR cannot be trained under fp16 autocast: a gradient scaler skips and rescales steps, "
                "which integers cannot follow. Use bf16 (`bf16=True`, `fp16=False`) or no autocast."
            )
        frozen: Any = self._modules["base_layer"]
        activations, values, learned = self.adapter_activations[adapter], None, None
        if activations is None:
            x = linear_input(x, frozen)
        else:
            x, values, learned = self._rounded(x, activations, [adapter])
        dtype = x.dtype if values is None else values.dtype
        bias = frozen._parameters["bias"]
        if bias is not None:
            bias = cast(bias, dtype)
        slot = self.slot()
        kept = None if slot is None else self._kept_weight(slot, dtype, adapter)
        if kept is not None:
            dense, scale = kept
            out = nn.functional.linear(x if values is None else through_rounding(x, values, learned), dense, bias)
            return out if scale is None else out * scale.to(out.dtype)
        scale, ternary, factor = self._scales(adapter)
        bits = weight.grid.code_bits
        if options.export_format == "bitnet":
            # integers times one scale, which multiplies the output, where its gradient is autograd's
            relative, projected, scale = self._bitnet_scales(scale, ternary)
            how = (relative, projected, 1 / weight.scale, None, bits, values, learned)
            out = low_bit_linear(x, weight, weight.packed, *how)
            return out * scale.to(out.dtype)
        operands = (weight, weight.packed, scale, ternary, factor, bias, bits)
        return low_bit_linear(x, *operands, values, learned, weight.taken_at_once, weight.gradient_places)

    @staticmethod
    def _bitnet_scales(
        scale: torch.Tensor, ternary: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Scales for a weight that is integers alone, as in BitNet's format.

        Returns:
            Scale and ternary scale as `low_bit_linear` takes them, (1, 1) each; and the one scale, (1,), of its output.
        """
        one = torch.ones_like(scale)
        if ternary is None:
            return one, None, scale.view(1)
        return (scale / ternary).detach(), one, ternary.view(1)

    def _kept_weight(
        self, slot: Slot, dtype: torch.dtype, adapter: str
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """What the input is multiplied with, (out, in) in `dtype`, and a scale of the output or None, where the layer
        keeps them: while the model generates."""
        weight: Any = self.lowbitsr_weight[adapter].weight

        def build() -> tuple[torch.Tensor, torch.Tensor | None]:
            scale, ternary, _ = self._scales(adapter)
            of_output = None
            if self.adapter_options[adapter].export_format == "bitnet":
                scale, ternary, of_output = self._bitnet_scales(scale, ternary)
            bits, width = weight.grid.code_bits, weight.shape[1]
            return low_bit_weight(weight.packed, scale, ternary, bits, width, dtype), of_output

        shifts = [self.lowbitsr_scale_shift[adapter].weight] if adapter in self.lowbitsr_scale_shift else []
        return slot.get(dtype, (weight.packed, weight.scale, *shifts), build, adapter)

    # -- merging

    def _levels(
        self, adapter: str, scale: torch.Tensor, ternary: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 (out, in), the integers of the forward, and the one of the two scales that they have."""
        weight: Any = self.lowbitsr_weight[adapter].weight
        if ternary is None:
            return weight.codes(), scale
        levels = low_bit_levels(weight.packed, scale, ternary, weight.grid.code_bits, weight.shape[1])
        return levels.to(torch.int8), ternary

    @torch.no_grad()
    def grid_tensor(
        self, adapters: list[str] | None = None, options: Any = None, safe_merge: bool = False
    ) -> GridTensor:
        """The integers that merging stores, without merging; those of the base if the layer has none of the adapters.

        Args: as in `MergingLayer`.

        Raises:
            ValueError: the layer has two of the adapters, or none, and its base is not what `options` describe.
        """
        names = self._adapters_at_work() if adapters is None else adapters
        adapter = self._the_one(names)
        if adapter is None:
            scale, frozen = self._stored_scale(names, options, safe_merge), self._needed_base()
            codes = unpack(frozen.base, frozen.fmt.bits, frozen.in_features)
            return GridTensor(codes, scale, None, frozen.grid)
        levels, scale = self._levels(adapter, *self._checked_scales(adapter, safe_merge))
        stored = self.adapter_options[adapter].stored_grid
        return GridTensor(levels, scale, None, stored, self._input_scale([adapter]))

    @torch.no_grad()
    def _stored_scale(self, adapters: list[str], options: Any, safe_merge: bool) -> torch.Tensor:
        adapter = self._the_one(adapters)
        if adapter is None:
            wanted = self.options_for([], options)
            if wanted.rounds_inputs or wanted.forward_bits is not None:
                raise ValueError(
                    "A layer is not part of the adapter that is merged, and its base computes without `act_bits` and "
                    "`forward_bits`, which the checkpoint would apply. Unload it first: adapt a fresh copy of the "
                    "float model with the adapter to merge."
                )
            return self._needed_base().scale0
        scale, ternary = self._checked_scales(adapter, safe_merge)
        return scale if ternary is None else ternary

    def _checked_scales(self, adapter: str, safe_merge: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """s and the ternary projection's scale (or None), after `_check_scale` of the one that merging stores."""
        mean = None
        if self.adapter_options[adapter].forward_bits is not None:
            mean = self._once_a_merge(adapter, lambda: self._mean_code(self._weight(adapter)))
        scale, ternary, _ = self._scales(adapter, mean)
        self._check_scale([adapter], safe_merge, scale if ternary is None else ternary)
        return scale, ternary

    @torch.no_grad()
    def sample_codes(self, rows: torch.Tensor, adapters: list[str]) -> tuple[torch.Tensor, int, int] | None:
        """As in `MergingLayer`; the trained integers, also where the forward makes ternary ones of them."""
        name = next((name for name in adapters if name in self.lowbitsr_weight), None)
        if name is None:
            return None
        weight: Any = self.lowbitsr_weight[name].weight
        grid = weight.grid
        return unpack(weight.packed[rows], grid.code_bits, weight.shape[1]), grid.qmin, grid.qmax

    def _float_layer(self) -> nn.Module:
        if isinstance(self.frozen, DroppedBase):
            raise ValueError(
                "`keep_base=False` dropped the base codes, so the adapter cannot be unloaded. Use merge_and_unload(), "
                "or load the float model again."
            )
        frozen = self.frozen
        return frozen.quantized_layer() if frozen.quantized_before else frozen.float_layer()

    def __repr__(self) -> str:
        return "lowbitsr." + super().__repr__()
