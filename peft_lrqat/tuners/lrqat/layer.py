"""The adapted layer of LR-QAT (arXiv 2406.06385).

An ordinary LoRA layer adds a product to the *output*: y = x W0^T + c x A^T B^T. When its weight is rounded afterwards,
the update, far smaller than a grid step almost everywhere, rounds away. LR-QAT adds the product to the weight *before*
the rounding, and trains through the rounding, so what is trained is what is stored:

    Phi = phi(W0 / s0)                       frozen, 1 byte or less a weight (`common/frozen.py`)
    Z   = Phi + c lora_B lora_A              c = lora_alpha / r; in units of one grid step (exact: `ops/factors.py`)
    Q   = clip(round(Z), qmin, qmax)         the integers of the final checkpoint
    W^  = s Q,    y = x W^T + bias           s starts at s0 and is trained

Gradients. The rounding passes gradients straight through; the clip stops them where it acts. With G = dL/dW^ = dY^T X
and M = [qmin <= round(Z) <= qmax]:

    dX = dY W^      dZ = M s G      d lora_B = c dZ lora_A^T      d lora_A = c lora_B^T dZ      ds = sum of G Q

ds sums over the entries that share s. It is not LSQ's formula: Phi does not depend on s, which scales integers only.

What is kept for backward: X, and the layer's own small or packed tensors. W^ is built for the product and dropped, and
built again for dX. Two identities spare the dense G where one scale serves a whole row (`ops/reference.py`):
ds_j = sum_t dY_tj Y_tj / s_j (so Y is kept, without bias), and, where nothing is clipped,
d lora_B = c s (dY^T (X lora_A^T)) and likewise for A, LoRA's own cost; the few clipped entries are subtracted one by
one.

The scale's parameter. Trained directly, a scale of 0.01 would need a learning rate of its own, would be decayed to zero
by an optimizer that decays it, and would stand still in bf16, where its neighbours are 0.4 % away. So the parameter is
the *relative change* `lora_scale_shift`, 0 at the start:

    s = snap(s0 (1 + lora_scale_shift))

One learning rate suits it and the adapter, weight decay pulls it back to s0, and it moves even when cast to bf16.
`snap` (straight-through) rounds to the numbers that the checkpoint stores, so the forward of training sees the stored
scale.

Activations. With `act_bits` the layer's input is first rounded per token (`round_activations`), with a straight-through
gradient, as engines do it with such a checkpoint.

One change a row. With `learn_scales="channel"` all groups of a row j share one entry of `lora_scale_shift`, and the
adapter counts steps of t_j = max_g |s0_jg|, the row's largest, so that it is LoRA in units of weight:

    Z = Phi + (t_j / s0_jg) c lora_B lora_A      s_jg = snap(s0_jg (1 + shift_j))

Both identities hold again, with groups: d lora_B = c t f (dY^T (X lora_A^T)), likewise for A, and
d shift_j = sum_t dY_tj Y_tj / f_j. f_j, the factor by which the row's scales have changed, is 1 + shift_j as the
checkpoint stores it for the largest: snapping is passed through as a factor.

Rank 0. Without lora_A and lora_B, Q is what it was, and the scales alone are trained (PEQA, arXiv 2305.14152): with
the same ds, none of the work for factors, and X and packed tensors kept as above.

Several adapters add up, in the adapters' usual sense, inside one rounding: their products and their scale shifts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...grid import GridTensor
from ...modules.packed import QuantizedLinear
from ...ops import trained_scale
from ...ops.reference import adapter_units, codes
from ...ops.shared_inputs import through_rounding
from ..common.frozen import FrozenWeight
from ..common.input_scale import AdapterWeight
from ..common.layer import MergingLayer, check_method
from ..common.packed_parameter import share, weight_of, whole
from ..common.readable import readable_weight, refuse_rounded_inputs
from .config import LRQATConfig
from .learning_rate import watch, watch_scales
from .loftq import residual_factors
from .strength import Strength


class Operands(NamedTuple):
    """The trained part of a layer."""

    shift: torch.Tensor | None  # (rows, groups) or (rows, 1): the relative change of the scales
    A: torch.Tensor | None  # (R, in), `LRQATConfig.adapter_unit`
    B: torch.Tensor | None  # (out, R)
    c: float  # lora_alpha / r


class LRQATLayer(Strength, MergingLayer):
    """What `get_peft_model` puts in the place of a layer for LR-QAT: PEFT's LoRA layer, with the adapter inside the
    rounding.

    The classes are `LRQATLinear` and, for embeddings and experts of mixtures, relatives of it. PEFT's containers are
    there (`lora_A`, `lora_B`, `scaling`, `r`), as are its methods (`merge`, `unmerge`, `get_delta_weight`).

    Attributes:
        base_layer (FrozenWeight): the base, in grid steps, in an integer dtype; while adapters are merged, the layer
            that the checkpoint will hold.
        lora_A, lora_B (nn.ModuleDict): adapter -> nn.Linear, whose weights are (r, in) and (out, r). Where an adapter
            has rank 0, lora_B has no entry, and lora_A one without a weight.
        lora_scale_shift (nn.ModuleDict): adapter -> AdapterWeight, fp32 (rows, groups), the relative change of the
            scales. With `learn_scales="channel"` it is (rows, 1); with `learn_scales=False` it has no entry.
        lora_act_scale (nn.ModuleDict): adapter -> InputScale, fp32 (1,), log2 of the fixed scale of inputs. Entries
            exist with `act_scale="static"` only.
        weight (torch.Tensor): float (out, in), the weight that the forward multiplies with, built anew whenever it is
            read.

    Examples:
        >>> from peft_lrqat import LRQATLayer
        >>> layers = {name: module for name, module in model.named_modules() if isinstance(module, LRQATLayer)}
        >>> layer = layers["base_model.model.model.layers.0.self_attn.q_proj"]
        >>> layer.get_delta_weight("default").abs().max()  # in grid steps; before training nothing moves
        tensor(0., grad_fn=<MaxBackward1>)
    """

    lora_A: Any  # nn.ModuleDict of nn.Linear; torch types what is inside as Tensor | Module
    lora_B: Any
    lora_scale_shift: Any
    lora_act_scale: Any

    adapter_layer_names = (*MergingLayer.adapter_layer_names, "lora_scale_shift", "lora_act_scale")

    @property
    def act_scales(self) -> Any:
        """`lora_act_scale`."""
        return self.lora_act_scale


class LRQATLinear(nn.Module, LRQATLayer):
    """An nn.Linear or Conv1D whose weight is rounded with the adapter inside."""

    base_layer: FrozenWeight
    frozen_class: type[FrozenWeight] = FrozenWeight

    def __init__(
        self,
        base_layer: nn.Linear | Conv1D | nn.Embedding | QuantizedLinear | FrozenWeight,
        adapter_name: str,
        config: LRQATConfig,
        r: int = 0,
        lora_alpha: int = 1,
        source_checksum: int | None = None,
        fixed_point: bool = False,
        **kwargs: Any,
    ) -> None:
        """Convert `base_layer` and add the first adapter. The layer's weight is not kept.

        Args:
            fixed_point: see `FrozenWeight.of_codes`.
            source_checksum: of that weight, if it is known.
        """
        super().__init__()
        frozen = self.frozen_class.of(base_layer, config, fixed_point=fixed_point, source_checksum=source_checksum)
        LRQATLayer.__init__(self, frozen, **kwargs)
        self.fan_in_fan_out = frozen.transposed
        self.name = kwargs.get("target_name", "")
        self.lora_scale_shift = nn.ModuleDict({})
        self.lora_act_scale = nn.ModuleDict({})
        self.activations = config.activations_of(self.name)  # all adapters of a model share it
        self._active_adapter = adapter_name
        # the float weight is at hand only now, for the initialization that wants it
        quantized = isinstance(base_layer, QuantizedLinear | FrozenWeight)
        self._float_weight = None if quantized else base_layer.weight.detach()
        try:
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        finally:
            del self._float_weight

    def train(self, mode: bool = True) -> LRQATLinear:
        """Set the mode, as torch's `train` does."""
        # A Trainer does in every step, and the GPU waits: there is nearly never something to set, and to see that takes
        # a fraction of the time that torch takes.
        return self if all(part.training == mode for part in self.modules()) else super().train(mode)

    # -- adapters

    def update_layer(  # type: ignore[override]  # the config is the one that the layer was made with
        self, adapter_name: str, r: int, lora_alpha: int, config: LRQATConfig, **kwargs: Any
    ) -> None:
        """Add an adapter (PEFT calls this). Raises ValueError if the layer is merged, or for one of another method."""
        check_method(config, LRQATConfig, adapter_name)
        frozen = self.frozen
        if config.learn_scales:
            shape = config.shift_shape(*frozen.scale0_bits.shape)
            self.lora_scale_shift[adapter_name] = AdapterWeight(
                torch.zeros(shape, dtype=torch.float32, device=frozen.device)
            )
        self._add_input_scale(adapter_name, config)
        if r:
            self._add_factors(adapter_name, r, lora_alpha, config, **kwargs)
        else:
            self._add_without_factors(adapter_name, lora_alpha, config)
        LoraLayer._move_adapter_to_device_of_base_layer(self, adapter_name)  # a new adapter takes the base's dtype
        self.adapter_options[adapter_name] = config
        if config.init_lora_weights is False:
            self._random_adapter(adapter_name)
        if not config.inference_mode:
            if r:
                # the factors of all experts lie in one: its rank, too, is that many times as large
                width = frozen.in_features * frozen.experts
                watch(self.lora_B[adapter_name], width, self.scaling[adapter_name])
            elif config.learn_scales:
                watch_scales(self.lora_scale_shift[adapter_name])

    def _add_factors(self, adapter_name: str, r: int, lora_alpha: int, config: LRQATConfig, **kwargs: Any) -> None:
        """Add lora_A and lora_B, as PEFT does it."""
        LoraLayer.update_layer(self, adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _add_without_factors(self, adapter_name: str, lora_alpha: int, config: LRQATConfig) -> None:
        """Note an adapter of rank 0, as PEFT notes those with factors."""
        self.r[adapter_name], self.lora_alpha[adapter_name], self.scaling[adapter_name] = 0, lora_alpha, 1.0
        self.use_rslora[adapter_name] = config.use_rslora
        self._note_without_factors(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _random_adapter(self, adapter_name: str) -> None:
        """`init_lora_weights=False`, for tests: an adapter that moves more than half of the weights."""
        if not self.r[adapter_name]:
            shift = weight_of(self.lora_scale_shift, adapter_name)
            if shift is not None and not shift.is_meta:
                nn.init.normal_(shift, std=0.1)
            return
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        if A.device.type == "meta":
            return
        # entries of A B with standard deviation 1 grid step, after scaling
        nn.init.normal_(A)
        nn.init.normal_(B, std=1 / (self.scaling[adapter_name] * self.r[adapter_name] ** 0.5))

    def loftq_init(self, adapter_name: str, config: LRQATConfig) -> None:  # type: ignore[override]  # as above
        """The best rank-r fit of what the stored base lost of W0, so that training starts nearer to the float model."""
        weight = getattr(self, "_float_weight", None)
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        nn.init.zeros_(B)
        loaded = A.device.type == "meta" or config._adapter_shapes is not None
        if loaded or config.makes_reference(adapter_name, self.adapter_options):
            return  # the adapter's values come from somewhere else
        if weight is None:
            raise ValueError(
                "`init_lora_weights='loftq'` needs the float weight, which is gone once the model is converted. Use it "
                "for the first adapter, and True for further ones."
            )
        weight = weight.t() if self.fan_in_fan_out else weight
        shift = self._operands([adapter_name]).shift
        factor_A, factor_B = residual_factors(weight, self.base_layer, self.r[adapter_name], self._units(shift))
        A.data.copy_(factor_A)
        B.data.copy_(factor_B / self.scaling[adapter_name])

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Compute c lora_B lora_A, what an adapter adds before the rounding.

        Args:
            adapter (str): the adapter's name.

        Returns:
            fp32 (out, in), transposed for Conv1D, in *grid steps*; with `learn_scales="channel"` on groups, in those of
            the row's largest scale (`LRQATConfig.adapter_unit`). Zeros at rank 0.
        """
        frozen = self.frozen
        if not self.r[adapter]:
            delta = torch.zeros(frozen.out_features, frozen.in_features, dtype=torch.float32, device=frozen.device)
        else:
            delta = self.lora_B[adapter].weight.float() @ self.lora_A[adapter].weight.float() * self.scaling[adapter]
        return delta.t() if self.fan_in_fan_out else delta

    def _operands(self, adapters: list[str]) -> Operands:
        """What these adapters make together, whole even if FSDP2 shards them."""
        if len(adapters) == 1 and adapters[0] in self.scaling:
            # nearly always: with little Python
            name, parts = adapters[0], self._modules
            shift, B = weight_of(parts["lora_scale_shift"], name), weight_of(parts["lora_B"], name)
            A: Any = None if B is None else weight_of(parts["lora_A"], name)
            if (B is not None and (A.is_meta or B.is_meta)) or (shift is not None and shift.is_meta):
                self._check_values(adapters)
            return Operands(shift, A, B, self.scaling[name])
        shifts = [whole(self.lora_scale_shift[name].weight) for name in adapters if name in self.lora_scale_shift]
        shift = None
        if shifts:
            shift = shifts[0] if len(shifts) == 1 else torch.stack([shift.float() for shift in shifts]).sum(0)
        present = [name for name in adapters if name in self.lora_B]
        A = [whole(self.lora_A[name].weight) for name in present]
        B = [whole(self.lora_B[name].weight) for name in present]
        if any(part.is_meta for part in (*shifts, *A, *B)):
            self._check_values(adapters)
        if not present:
            return Operands(shift, None, None, 1.0)
        if len(present) == 1:
            return Operands(shift, A[0], B[0], self.scaling[present[0]])
        scaled = [b.float() * self.scaling[name] for b, name in zip(B, present, strict=True)]
        return Operands(shift, *self._side_by_side([a.float() for a in A], scaled), 1.0)

    def _side_by_side(self, A: list[torch.Tensor], B: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors whose product is the sum of the products of these."""
        return torch.cat(A), torch.cat(B, 1)

    def _trained_scales(self, adapters: list[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
        shifts = [share(self.lora_scale_shift[name].weight) for name in adapters if name in self.lora_scale_shift]
        if not shifts:
            return None
        start = share(self.frozen.scale0_bits).to(self.frozen.device).view(torch.float32)
        return start, start * (1 + torch.stack([shift.float() for shift in shifts]).sum(0))

    def _scale(self, shift: torch.Tensor | None) -> torch.Tensor:
        """s: fp32 (rows, groups), as the checkpoint stores it."""
        return trained_scale(self.frozen.scale0, shift, self.frozen.scale_dtype)

    def _units(self, shift: torch.Tensor | None) -> torch.Tensor | None:
        """Grid steps a unit of the adapter: fp32 (rows, groups), or None, 1."""
        return adapter_units(self.frozen.scale0, shift)

    @torch.compiler.disable
    def _read(self, adapters: list[str]) -> torch.Tensor:
        frozen = self.frozen
        *trained, c = self._operands(adapters)
        with torch.no_grad():
            values = frozen.built(*trained, c)

        def product(x: torch.Tensor, *trained: torch.Tensor | None) -> torch.Tensor:
            refuse_rounded_inputs(self.activations)
            return frozen.product(x, None, *trained, c)

        return readable_weight(values, product, *trained)

    # -- forward

    forward = MergingLayer.forward  # nn.Module's, which raises, would come first

    def _run(self, x: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        frozen: Any = self._modules["base_layer"]
        x, values, learned = self._rounded(x, self.activations, adapters)
        dtype = x.dtype if values is None else values.dtype
        bias: torch.Tensor | None = frozen._parameters["bias"]
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        weight = self._kept_weight(dtype, adapters)
        if weight is not None:
            return nn.functional.linear(x if values is None else through_rounding(x, values, learned), weight, bias)
        return frozen.product(x, bias, *self._operands(adapters), values, learned)

    def _kept_weight(self, dtype: torch.dtype, adapters: list[str]) -> torch.Tensor | None:
        """W^ with these adapters, (out, in) in `dtype`, where the layer keeps it: while the model generates."""
        frozen: Any = self._modules["base_layer"]
        slot = frozen.slot()
        if slot is None:
            return None
        key = tuple((name, self.scaling[name]) for name in adapters if name in self.scaling)
        present = [name for name in adapters if name in self.lora_B]
        factors = [factor[name].weight for name in present for factor in (self.lora_A, self.lora_B)]
        shifts = [self.lora_scale_shift[name].weight for name in adapters if name in self.lora_scale_shift]
        return frozen.kept_weight(dtype, slot, (*factors, *shifts), key, lambda: self._operands(adapters))

    # -- merging

    @torch.no_grad()
    def grid_tensor(
        self, adapters: list[str] | None = None, options: Any = None, safe_merge: bool = False
    ) -> GridTensor:
        frozen = self.frozen
        if adapters is None:
            adapters = self._adapters_at_work()
        scale = self._stored_scale(adapters, options, safe_merge)
        levels = self._levels(*self._operands(adapters))
        return GridTensor(levels, scale, frozen.here(frozen.zero_point), frozen.grid, self._input_scale(adapters))

    @torch.no_grad()
    def _stored_scale(self, adapters: list[str], options: Any, safe_merge: bool) -> torch.Tensor:
        shift, A, B, _ = self._operands(adapters)
        scale = self._scale(shift)
        self._check_scale(adapters, safe_merge, scale, A, B)
        return scale

    def moves_integers(self, adapters: list[str]) -> bool:
        return any(name in self.lora_B for name in adapters)

    @torch.no_grad()
    def sample_codes(self, rows: torch.Tensor, adapters: list[str]) -> tuple[torch.Tensor, int, int] | None:
        frozen, (shift, A, B, c) = self.frozen, self._operands(adapters)
        if shift is None and B is None:
            return None
        units = self._units(shift)
        some = codes(
            frozen.here(frozen.base)[rows],
            A,
            None if B is None else B[rows],
            frozen.fmt,
            c,
            units if units is None or len(units) == 1 else units[rows],
        )
        return some, frozen.fmt.qmin, frozen.fmt.qmax

    def _levels(
        self, shift: torch.Tensor | None, A: torch.Tensor | None, B: torch.Tensor | None, c: float
    ) -> torch.Tensor:
        """The codes, int8 (out, in)."""
        return codes(self.frozen.here(self.frozen.base), A, B, self.frozen.fmt, c, self._units(shift))

    def _float_layer(self) -> nn.Module:
        return self.frozen.quantized_layer() if self.frozen.quantized_before else self._as_it_was()

    def _as_it_was(self) -> nn.Module:
        """The base at step 0 as the kind of float layer that it was."""
        return self.frozen.float_layer()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        weight, frozen = state_dict.get(f"{prefix}base_layer.weight"), self.frozen
        given = any(key.startswith(f"{prefix}lora_") for key in state_dict)
        if weight is not None and given and not self.merged and not frozen.shows(weight):
            ours = frozen.compute_dtype
            cast = "" if weight.dtype == ours else f", or was cast: it is {weight.dtype}, the model's is {ours}"
            errors.append(
                f"{prefix}base_layer.weight is that of another base{cast}. A state dict of a model with adapters "
                "inside has the base rounded, and not the fractions of grid steps over which its adapters were "
                "trained. Make the model of the same float weights first, or load the adapter alone: "
                "`get_peft_model_state_dict`, or `PeftModel.save_pretrained`."
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def __repr__(self) -> str:
        return "lrqat." + super().__repr__()
