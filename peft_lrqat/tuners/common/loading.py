"""Quantizing a model while transformers loads it, so that no more of it is ever float than one tensor.

`from_pretrained(..., quantization_config=config.for_loading())` asks transformers for a quantizer of this package. It
chooses the layers while the model is on the meta device, by the rules of `get_peft_model`, and replaces each by its
`FrozenWeight` as soon as its weight has been read, cast and moved as any weight is. `get_peft_model` takes these layers
as they are. So all numbers are those of a model that is loaded in float and converted.

Of a mixture transformers first gathers a projection of all experts of a layer, which is then quantized as one weight.
When a layer has all its projections, `modules.experts.Experts` takes the place of transformers' module.

Some layers are left for `get_peft_model` to convert or to refuse: what the checkpoint does not have as it stands in the
model (no such weight, another shape, a bias missing, values that are not finite), what is in another dtype than the
rest of the model, or spread over processes; and embeddings.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...modules.architecture import expert_parts
from ...modules.experts import Experts, ExpertStack, projections
from .fingerprint import float_checksum
from .frozen import FrozenWeight
from .parallel import check_announced

#: How transformers calls this quantizer; no saved model has this name in its config.json.
NAME = "peft_lrqat_on_loading"


@register_quantization_config(NAME)
class LoadingConfig(QuantizationConfigMixin):
    """What `for_loading` returns: `from_pretrained` takes it as `quantization_config`.

    Attributes:
        config: a copy of the configuration, an `LRQATConfig` or a `LowBitSRConfig`.
    """

    def __init__(self, config: Any, **kwargs: Any) -> None:
        """
        Args:
            config: the configuration, or its fields as `to_dict` gives them.
        """
        self.quant_method = NAME  # type: ignore[assignment]  # transformers' enum has its own methods only
        self.config = PeftConfigMixin.from_peft_type(**config) if isinstance(config, dict) else copy.deepcopy(config)

    def to_dict(self) -> dict[str, Any]:
        """The configuration's fields, as JSON can hold them."""
        fields = json.dumps(self.config.to_dict(), default=lambda v: sorted(v) if isinstance(v, set) else str(v))
        return {"quant_method": NAME, "config": json.loads(fields)}


@register_quantizer(NAME)
class LoadingQuantizer(HfQuantizer):
    """What transformers asks while it loads a model with a `LoadingConfig`."""

    quantization_config: Any

    def __init__(self, quantization_config: LoadingConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._config = quantization_config.config
        self._tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[self._config.peft_type]
        self._waiting: set[str] = set()  # names of the modules whose weight has yet to be read
        self._experts: dict[str, ExpertStack] = {}  # likewise of projections of experts, which have no module yet
        self._read: dict[str, dict[str, FrozenWeight]] = {}  # experts -> projection -> layer, as far as they were read

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise ValueError for ways of loading after which nothing could be trained.

        transformers calls it before it looks at the files, and again when it has made a device map out of "auto".
        """
        check_announced(trains_integers=self._tuner.trains_integers)
        self._config.conversion_device()
        if not isinstance(device_map, dict):
            return
        places = {"disk" if place == "disk" else _device_type(place) for place in device_map.values()}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            away = sorted(name or "the model" for name, place in device_map.items() if str(place) in ("cpu", "disk"))
            raise ValueError(
                f"`device_map` leaves a part of the model ({', '.join(away[:3])}{' ...' if len(away) > 3 else ''}) on "
                "the CPU or on disk, from where accelerate would load it for every call, and such layers cannot be "
                "trained. Use `device_map={'': 0}` (one device), more devices, or fewer bits."
            )

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes a weight, by which transformers makes a device map out of "auto"."""
        if self.param_needs_quantization(model, param_name):
            return 0 if self._config.offload_base else self._config.bytes_per_weight
        return param.element_size()

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is the weight of a layer that is to be quantized, and was not read yet."""
        module, _, part = param_name.rpartition(".")
        return param_name in self._experts or (part == "weight" and module in self._waiting)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def _process_model_before_weight_loading(self, model: Any, dtype: Any = None, **kwargs: Any) -> Any:
        targets = self._tuner.find_targets_to_load(model, self._config)
        layers = {
            name: module
            for name, module in targets.items()
            # another dtype is not what transformers casts to before it asks for an operation
            if not isinstance(module, nn.Embedding) and (dtype is None or module.weight.dtype == dtype)
        }
        self._experts = {name: module for name, module in layers.items() if isinstance(module, ExpertStack)}
        self._waiting = layers.keys() - self._experts.keys()
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # a saved config.json, Trainer and PEFT shall see what the model is: one that can be trained and saved
        self.remove_quantization_config(model)
        for path in list(self._read):  # a projection was left as it is, for `get_peft_model` to convert or to refuse
            self._make_experts(model, path)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
            if isinstance(module, FrozenWeight):
                module.loading = False
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """True: the loaded model is saved as the floats that its integers stand for."""
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def quantize(self, model: nn.Module, name: str, weight: torch.Tensor) -> bool:
        """Replace a layer by its converted form.

        Args:
            name: of its weight.
            weight: its values, in the dtype and where the model is to have them.

        Returns:
            Whether that was done; if not, the layer is to get the weight as it is.
        """
        if name in self._experts:
            return self._quantize_experts(model, name, weight)
        path = name.rpartition(".")[0]
        layer: Any = model.get_submodule(path)
        self._waiting.discard(path)
        bias = layer.bias
        if (
            weight.shape != layer.weight.shape
            or type(layer.weight.data) is not torch.Tensor  # a DTensor: the values are a part
            or (bias is not None and bias.is_meta)
        ):
            return False
        checksum = float_checksum(weight.t() if isinstance(layer, Conv1D) else weight)
        if checksum is None:
            return False
        layer.weight = nn.Parameter(weight, requires_grad=False)
        frozen = FrozenWeight.of(layer, self._config, source_checksum=checksum)
        frozen.training, frozen.loading = layer.training, True
        frozen._is_hf_initialized = True  # transformers shall not initialize it
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, frozen)
        layer.weight = None
        return True

    def _quantize_experts(self, model: nn.Module, name: str, weight: torch.Tensor) -> bool:
        """`quantize`, of a projection of experts, (experts, out, in). The last one of a layer makes it a module."""
        expected = self._experts.pop(name)
        path, _, projection = name.rpartition(".")
        if type(weight) is not torch.Tensor or weight.shape != expected.stacked.shape:
            return False
        stack = ExpertStack(weight)
        checksum = float_checksum(stack.weight.detach())
        if checksum is None:
            return False
        frozen = self._tuner.frozen_experts.of(stack, self._config, source_checksum=checksum)
        frozen.loading, frozen._is_hf_initialized = True, True
        self._read.setdefault(path, {})[projection] = frozen
        if len(self._read[path]) == len(projections(model.get_submodule(path))):
            # not before: transformers asks the module for its parameters while others are read
            self._make_experts(model, path)
        return True

    def _make_experts(self, model: nn.Module, path: str) -> None:
        """Put layers in the place of experts whose projections have been read."""
        module: Any = model.get_submodule(path)
        parts = expert_parts(model, path)
        assert parts is not None  # or it had not been chosen
        experts = Experts(module, parts)
        for projection, layer in self._read.pop(path).items():
            layer.training = module.training
            experts._modules[projection] = layer
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, experts)


class _Quantize(ConversionOps):
    """What transformers runs on a weight that is to be quantized."""

    def __init__(self, quantizer: LoadingQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *args: Any, model: Any = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The tensors that the model is to get as they are; the others have become layers."""
        left = {}
        for name, value in input_dict.items():
            tensors = value if isinstance(value, list) else [value]
            wanted = self.quantizer.param_needs_quantization(model, name) and len(tensors) == 1
            if not (wanted and self.quantizer.quantize(model, name, tensors[0])):
                left[name] = value
            elif missing_keys is not None:
                missing_keys.discard(name)
        return left


def loaded_layers(model: nn.Module) -> dict[str, FrozenWeight]:
    """Name -> layer of what was quantized while it was loaded, and has no adapter yet."""
    found: dict[str, FrozenWeight] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            inside += (name + ".",)
        elif isinstance(module, FrozenWeight) and not name.startswith(inside):
            found[name] = module
    return found


def adopt_loaded(model: nn.Module, targets: dict[str, nn.Module], config: Any) -> None:
    """Complete `config` by the grid of layers that were quantized while they were loaded, if there are any.

    Raises:
        ValueError: `config` would have converted them otherwise, or does not target all of them.
    """
    loaded = loaded_layers(model)
    if others := sorted(loaded.keys() - targets.keys()):
        raise ValueError(
            f"{len(others)} layers were quantized while the model was loaded, but the configuration does not target "
            f"them, e.g. {others[0]!r}. {_HOW}"
        )
    for name, layer in loaded.items():
        theirs = _options(layer.grid, layer.downcast, layer.scale_dtype, layer.ranges)
        if hasattr(config, "adopt"):
            config.adopt(**theirs)
        ours = _options(config.grid, config.kept_as, config.scale_dtype, config.ranges)
        if other := [option for option in ours if ours[option] != theirs.get(option)]:
            wanted, found = (", ".join(f"{o}={options.get(o)!r}" for o in other) for options in (ours, theirs))
            raise ValueError(
                f"The configuration asks for {wanted}, but module {name!r} was quantized with {found} while the model "
                f"was loaded. {_HOW}"
            )


_HOW = (
    "Load the model with `quantization_config=config.for_loading()` of the configuration that it is adapted with (for "
    "a saved adapter: that of `PeftConfig.from_pretrained(folder)`)."
)


def _options(grid: Any, downcast: str, scale_dtype: str, ranges: Any) -> dict[str, Any]:
    """What decides the integers and scales of a float weight, as the configurations call it."""
    method, p, signed, headroom = ranges
    options = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric, "downcast": downcast}
    options |= {"scale_dtype": scale_dtype, "range_method": method, "signed_scales": signed, "headroom": headroom}
    return {**options, "range_p": p} if method == "lp" else options


def _device_type(place: Any) -> str:
    return "accelerator" if isinstance(place, int) else torch.device(place).type
