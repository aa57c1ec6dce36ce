"""What the layers of both methods share: a base of integers that merging replaces and unmerging puts back.

What merging makes of a layer depends on options (container width, activations ...), which belong to an adapter. Each
layer keeps them by adapter, and merging takes those of the first adapter that is merged. A layer that has none of the
adapters is quantized all the same, with the options of the model. They are an argument; where PEFT is between caller
and layer, they are the `merging` context.

While adapters are merged in place, `base_layer` shows the weight that it stands for to whoever walks the parameters of
the model, as TRL does to sync it to vLLM (`modules/served_weight.py`). So merging replaces the bases of *all* layers,
those without any of the adapters too: no integers of a base are left under names that an engine does not know.
"""

from __future__ import annotations

import contextlib
import contextvars
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ...formats.source import LayerInfo
from ...grid import GridTensor, scale_bounds, scales_out_of_range
from ...modules.carry import carry_hooks
from ...modules.packed import merged_layer
from .input_scale import RoundsInput
from .plain import user_attributes
from .unfilled import refuse_unfilled


class _Merge(NamedTuple):
    """What the layers know of the merge of a whole model."""

    options: Any
    computed: weakref.WeakKeyDictionary[Any, dict[str, torch.Tensor]]  # layer -> adapter -> what it was checked with


_MERGE: contextvars.ContextVar[_Merge | None] = contextvars.ContextVar("merge", default=None)


@contextlib.contextmanager
def merging(options: Any) -> Iterator[None]:
    """Layers that are merged in this context, and have none of the adapters, are merged with these options.

    Nothing may be trained in it: what a layer computes to be checked, it need not compute to be merged.
    """
    token = _MERGE.set(_Merge(options, weakref.WeakKeyDictionary()))
    try:
        yield
    finally:
        _MERGE.reset(token)


def check_method(config: Any, wanted: type, adapter_name: str) -> None:
    """Raise ValueError for an adapter of another method, such as LoRA, on a layer that has one of `wanted`."""
    if not isinstance(config, wanted):
        raise ValueError(
            f"Adapter {adapter_name!r} has a {type(config).__name__}, but the layers of this model are those of "
            f"{wanted.__name__}. An adapter of another method goes onto the merged model "
            "(`model.merge_and_unload()`), or onto a fresh copy of the float model."
        )


def describe_lost(scale_dtype: str) -> str:
    """What has happened to scales that training has lost, and what to do: the end of a sentence, and one more."""
    smallest, largest = scale_bounds(scale_dtype)
    return (
        f"have left what `scale_dtype={scale_dtype!r}` holds (magnitudes of {smallest:.3g} to {largest:.3g}), or are "
        "not finite: the forward holds them at the end of that range, and training does not move them any more. Take "
        "an earlier checkpoint, and a lower learning rate for the scales, or `learn_scales=False`."
    )


def parameters_become_meta() -> bool:
    """Whether PEFT puts new parameters on the meta device just now: within its `low_cpu_mem_usage`."""
    probe = nn.Module()
    probe.register_parameter("parameter", nn.Parameter(torch.empty(0)))
    return probe.get_parameter("parameter").is_meta


class _NoDropout(dict):
    """PEFT's `lora_dropout`, which stays empty: PEFT adds an nn.Identity to it for each adapter."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        pass


class MergingLayer(RoundsInput, LoraLayer):
    """A layer over a `FrozenWeight` whose `base_layer` is what the checkpoint will hold while adapters are merged.

    A subclass has `act_scales`, and what raises NotImplementedError here.

    Attributes:
        adapter_options: adapter -> its configuration.
        name: of the module in the model.
    """

    name: str
    base_layer: Any
    named_parameters: Any  # of nn.Module, which a subclass is as well
    _before_merge: Any = None

    other_param_names = (*LoraLayer.other_param_names, "adapter_options")

    # What PEFT's layer has for embeddings, DoRA and dropout, and reads. They are no modules of each layer, because a
    # Trainer walks through all modules of a model five times a step, while the GPU waits.
    lora_embedding_A: Any = MappingProxyType({})
    lora_embedding_B: Any = MappingProxyType({})
    lora_magnitude_vector: Any = MappingProxyType({})
    lora_dropout: Any = _NoDropout()

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        super().__init__(base_layer, ephemeral_gpu_offload, **kwargs)
        for name in ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_dropout"):
            delattr(self, name)
        self.adapter_options: dict[str, Any] = {}
        self._calibrated = set()

    @property
    def frozen(self) -> Any:
        """The base, also while an adapter is merged."""
        return self._before_merge or self.base_layer

    @property
    def merged(self) -> bool:
        """Whether the base is replaced by what the checkpoint will hold."""
        return self._before_merge is not None

    @property
    def kind(self) -> Any:
        """What the layer was before: "linear", "conv1d" or "embedding"."""
        return "conv1d" if self.frozen.transposed else "linear"

    @property
    def weight(self) -> torch.Tensor:
        """The weight W^ with the active adapters, in the model's dtype and the original orientation, for modules that
        read it.

        Built anew, and differentiable (`readable.py`).
        """
        if self.disable_adapters:
            return self.frozen.weight
        if self.merged:
            return self.base_layer.weight
        weight = self._read(self._adapters_at_work())
        return weight.t() if self.frozen.transposed else weight

    def _read(self, adapters: list[str]) -> torch.Tensor:
        """W^ with these adapters, (out, in), differentiable."""
        raise NotImplementedError

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: rounding is not additive."""
        return False

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.frozen.device, self.frozen.compute_dtype

    def _note_without_factors(self, adapter_name: str) -> None:
        """Let PEFT know an adapter that has no lora_A: that is where it looks up those of a mixed batch."""
        self.lora_A[adapter_name] = nn.Identity()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to where the base is, as it is: PEFT would round what was loaded to the base's dtype, and
        would make it trainable."""
        for name in self.adapter_layer_names:
            container: Any = getattr(self, name)
            if adapter_name in container and not any(p.is_meta for p in container[adapter_name].parameters()):
                container[adapter_name].to(device or self.frozen.device)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    # -- forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the layer's output, with the active adapters: x (..., in) to (..., out)."""
        adapter_names = None
        if kwargs:
            self._check_forward_args(x, *args, **kwargs)
            adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._run(x, [])
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names=adapter_names)
        if self.merged:
            return self._run_merged(x)
        return self._run(x, self.active_adapters)

    def _run(self, x: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        """The layer, not merged, with those of these adapters that it has; the base where it has none."""
        raise NotImplementedError

    def _run_merged(self, x: torch.Tensor) -> torch.Tensor:
        """The layer while it is merged."""
        return self.base_layer(x)

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """Each sample with its own adapter: one weight for each adapter in the batch."""
        out: torch.Tensor | None = None
        for name in dict.fromkeys(adapter_names):
            index = [i for i, other in enumerate(adapter_names) if other == name]
            part = self._run(x[index], [] if name == "__base__" else [name])
            if out is None:
                out = part.new_empty(x.shape[0], *part.shape[1:])
            out[index] = part
        return out if out is not None else self._run(x, [])

    # -- what merging makes of the layer

    def options_for(self, adapters: list[str], options: Any = None) -> Any:
        """The options of the first of these adapters that the layer has, or else `options`, the model's.

        Raises:
            ValueError: the layer has none of them, and `options` is None.
        """
        own = next((self.adapter_options[name] for name in adapters if name in self.adapter_options), None)
        merge = _MERGE.get()
        # a model into which adapters were injected has no options of its own
        found = own or options or (merge and merge.options) or next(iter(self.adapter_options.values()), None)
        if found is None:
            raise ValueError("No adapter is left, so nothing says how to merge. Add one, or call `unload()`.")
        return found

    def _adapters_at_work(self) -> list[str]:
        """The merged adapters, or else the active ones, as far as the layer has them."""
        names = self.merged_adapters if self.merged else self.active_adapters
        return [name for name in names if name in self.adapter_options]

    def info_for(self, options: Any = None) -> LayerInfo:
        """What merging makes of the layer.

        Args:
            options: the model's, for a layer that has none of its adapters.
        """
        frozen, options = self.frozen, self.options_for(self._adapters_at_work(), options)
        return LayerInfo(
            frozen.out_features,
            frozen.in_features,
            options.stored_grid,
            self.kind,
            frozen.bias is not None,
            frozen.compute_dtype,
            options.stored_bits,
            options.activations_of(self.name),
        )

    def grid_tensor(
        self, adapters: list[str] | None = None, options: Any = None, safe_merge: bool = False
    ) -> GridTensor:
        """The integers that merging stores, without merging.

        Args:
            adapters: None: the merged ones, or else the active ones.
            options: the model's, for a layer that has none of its adapters.
            safe_merge: refuse values that are not finite.
        """
        raise NotImplementedError

    def _merged(self, adapters: list[str], options: Any = None, safe_merge: bool = False) -> Any:
        """What takes the base's place while adapters are merged: packed, whatever kind of layer it was."""
        frozen, options = self.frozen, self.options_for(adapters, options)
        weight = self.grid_tensor(adapters, options, safe_merge)
        self._check_dtype(weight.scale, weight.input_scale)
        return merged_layer(
            weight,
            frozen.bias,
            options.stored_bits,
            frozen.compute_dtype,
            embedding=self.kind == "embedding",
            experts=frozen.experts,
            activations=options.activations_of(self.name),
        )

    def _check_dtype(self, *scales: torch.Tensor | None) -> None:
        """Raise ValueError unless the model's dtype holds these scales exactly."""
        frozen, dtype = self.frozen, self.frozen.compute_dtype
        given = [scale for scale in scales if scale is not None]
        if not all(torch.equal(s.to(dtype).float().nan_to_num(), s.nan_to_num()) for s in given):
            raise ValueError(
                f"The model is {dtype} now, which cannot hold the scales of `scale_dtype={frozen.scale_dtype!r}` "
                "exactly. Call `model.float()` before merging (or cast the model back to what it was), train with "
                "`scale_dtype='auto'`, or leave the model unmerged: `export(..., format='gguf')` stores fp16 scales."
            )

    def check_merge(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Raise the ValueError with which `merge` would end, from scales alone: no integers are computed."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in dict.fromkeys([*self.merged_adapters, *wanted]) if name in self.adapter_options]
        if self.merged and names == self.merged_adapters:
            return
        options = self.options_for(names)
        self._check_dtype(self._stored_scale(names, options, safe_merge), self._input_scale(names))

    def _stored_scale(self, adapters: list[str], options: Any, safe_merge: bool) -> torch.Tensor:
        """The scale that merging stores, fp32 (rows, groups); `grid_tensor` says for which arguments.

        Raises:
            ValueError: no checkpoint can hold it, or the method cannot merge these adapters.
        """
        raise NotImplementedError

    def _once_a_merge(self, adapter: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `compute` returns for an adapter. Where a whole model is merged, whose layers are all checked before the
        first is changed, it is called in the check alone.
        """
        merge = _MERGE.get()
        computed = {} if merge is None else merge.computed.setdefault(self, {})
        if adapter not in computed:
            computed[adapter] = compute()
        return computed[adapter]

    def check_input_scale(self) -> None:
        """Raise ValueError if the fixed scale of inputs, of the adapters that would be merged, is not set yet."""
        if not self.merged:
            self._input_scale(self._adapters_at_work())

    def _check_values(self, adapters: list[str]) -> None:
        """Raise ValueError, for adapters on the meta device, unless the whole layer is there."""
        if self.frozen.device.type != "meta":
            refuse_unfilled(adapters, self.name)

    def _stored(self, packed: Any) -> nn.Module:
        """The layer of a quantized model that takes the place of this one, from what `_merged` makes."""
        packed.hide_weight()
        if self.kind != "conv1d":
            return packed
        return merged_layer(packed.grid_tensor(), packed.bias, packed.bits, packed.compute_dtype, transposed=True)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the integers: `base_layer` becomes what the checkpoint will hold.

        The codes come from the same function as in forward, so the output does not change by a bit. A layer that has
        none of the adapters then has its base at step 0, as in the checkpoint.

        Args:
            safe_merge (bool): refuse adapters that are not finite.
            adapter_names (list[str] | None): which adapters. None: the active ones.

        Raises:
            ValueError: with `safe_merge`, a value is NaN or infinite; or the method cannot add these adapters up.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapter_options]
        if self.merged and not names:
            return
        if self.merged:
            self._catch_up()
        merged = self._merged([*self.merged_adapters, *names], safe_merge=safe_merge)
        merged.kv_bits = self.options_for([*self.merged_adapters, *names]).kv_bits
        merged.show_weight(transposed=self.kind == "conv1d")
        # kept outside of the module tree: it is neither saved nor trained while the layer is merged
        object.__setattr__(self, "_before_merge", self.frozen)
        self.base_layer = merged
        self.merged_adapters.extend(names)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The layer that replaces this one: the quantized layer, or the base at step 0 as the kind of layer it was."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = self._stored(self.base_layer)
        else:
            layer = self._float_layer()
        self._give_to(layer, cast(nn.Module, self))
        return layer

    def take_from(self, module: nn.Module) -> None:
        """Take over what users, and accelerate, have hung on the layer that this one replaces."""
        object.__setattr__(self, "_user_attributes", user_attributes(module))
        self._give_to(self, module)

    def _give_to(self, layer: Any, hooked: nn.Module) -> None:
        carry_hooks(hooked, layer)
        for name, value in vars(self).get("_user_attributes", {}).items():
            if not hasattr(layer, name):
                object.__setattr__(layer, name, value)

    def _float_layer(self) -> nn.Module:
        """The base at step 0 as the kind of layer that it was."""
        return self.frozen.float_layer()

    @torch.no_grad()
    def scales_lost(self, adapters: list[str] | None = None) -> torch.Tensor | None:
        """How many scales training has moved out of what `scale_dtype` holds, or to zero, below it, or to NaN.

        Args:
            adapters: None: those at work.

        Returns:
            int64 scalar on the layer's device, of this rank's share where FSDP2 shards; None: no scale is trained.
        """
        found = self._trained_scales(self._adapters_at_work() if adapters is None else adapters)
        if found is None:
            return None
        start, scale = found
        return scales_out_of_range(scale, start, self.frozen.scale_dtype).sum()

    def moves_integers(self, adapters: list[str]) -> bool:
        """Whether training these adapters can make other integers; else only the scales change."""
        return True

    def sample_codes(self, rows: torch.Tensor, adapters: list[str]) -> tuple[torch.Tensor, int, int] | None:
        """The integers of some rows as these adapters have moved them, for a look while training goes on.

        Args:
            rows: int64 (n,), of the weight.

        Returns:
            int8 (n, in) on the layer's device, and the ends of the grid; None: the layer has none of the adapters.
        """
        raise NotImplementedError

    def _trained_scales(self, adapters: list[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """This rank's scales before training, and as these adapters have moved them, fp32, not snapped; None: the
        adapters train no scales.
        """
        raise NotImplementedError

    def _check_scale(
        self, adapters: list[str], safe_merge: bool, scale: torch.Tensor, *others: torch.Tensor | None
    ) -> None:
        """Raise ValueError unless a checkpoint can hold these scales and, with `safe_merge`, all is finite."""
        if safe_merge and not all(torch.isfinite(t).all() for t in (scale, *others) if t is not None):
            adapter = adapters[-1] if adapters else ""
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        lost = self.scales_lost(adapters)
        if lost is not None and int(lost):
            raise ValueError(
                f"The layer cannot be merged: {int(lost)} scales of {self.name!r} "
                f"{describe_lost(self.frozen.scale_dtype)}"
            )

    def unmerge(self) -> None:
        """Put the base back. Nothing was lost."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._catch_up()
        frozen = self._before_merge
        object.__setattr__(self, "_before_merge", None)
        self.base_layer = frozen
        self.merged_adapters.clear()

    def _catch_up(self) -> None:
        """Have the base that waits go where the model has gone meanwhile, which does not find it: device and dtype."""
        here = next(t.device for t in (*self.base_layer.parameters(), *self.base_layer.buffers()))
        self._before_merge.to(here)
        if self._before_merge.compute_dtype != self.base_layer.compute_dtype:  # or a bias of another dtype were cast
            self._before_merge.to(self.base_layer.compute_dtype)
