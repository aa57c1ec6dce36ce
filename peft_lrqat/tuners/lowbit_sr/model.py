"""`LowBitSRModel`: PEFT's tuner class for low-bit SR."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...checkpoint.adopt import adopt_compressed_tensors
from ..common.model import QuantizingModel
from ..common.quantized_base import check_grid, is_fixed_point, packed_targets, scales_of
from .config import LowBitSRConfig
from .growth import warn_of_full_grids
from .in_backward import leave_to_trainer
from .layer import LowBitSRLayer, LowBitSRLinear
from .parts import PARTS


class LowBitSRModel(QuantizingModel):
    """The tuner of low-bit SR: it makes the weights of linear layers trainable integers.

    `get_peft_model(model, LowBitSRConfig(...))` makes it, and `peft_model.base_model` is it. Its methods are PEFT's.
    `merge_and_unload()` gives the model with the trained integers; `unload()` gives the rounded base, in float (it
    needs `keep_base=True`).

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_lrqat import LowBitSRConfig, LowBitSRModel
        >>> model = get_peft_model(base, LowBitSRConfig(bits=1.58, group_size=0, act_bits=8))
        >>> isinstance(model.base_model, LowBitSRModel)
        True
        >>> merged = model.merge_and_unload()
        >>> merged.save_pretrained("merged")  # BitNet's format, for this grid
    """

    prefix = "lowbitsr_"
    tuner_layer_cls = LowBitSRLayer
    config_cls = LowBitSRConfig
    trains_integers = True
    shared_options = (
        "bits",
        "group_size",
        "range_method",
        "range_p",
        "headroom",
        "scale_dtype",
        "signed_scales",
        "keep_base",
        "kv_bits",
        "kv_rule",
    )

    # -- before anything is changed

    def _adopt_base(self, model: nn.Module, config: Any, state_dict: dict | None) -> bool:
        adopted = adopt_compressed_tensors(model)
        if packed := packed_targets(model, self._targets(model, config, state_dict)):
            check_grid(model, packed, config)
            _, holds = scales_of(packed)
            if config.scale_dtype not in holds:
                raise ValueError(
                    f"`scale_dtype` is {config.scale_dtype!r}, which does not hold the scales of the quantized base. "
                    f"Use {holds[0]!r}."
                )
        return adopted

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1 and not config.keep_base:
            raise ValueError(
                f"`keep_base=False` dropped the base codes, at which adapter {list(self.peft_config)[-1]!r} would "
                "start. Adapt the float model with `keep_base=True` for several adapters, one of which may be TRL's "
                "reference."
            )

    def _check_targets(self, targets: dict[str, nn.Module], config: LowBitSRConfig) -> None:
        super()._check_targets(targets, config)
        for name, module in targets.items():
            if isinstance(module, BaseTunerLayer) or config.export_format != "bitnet":
                continue
            linear: Any = module
            bias, rows = linear.bias, linear.nf if isinstance(linear, Conv1D) else linear.out_features
            if bias is not None or rows % 4:
                what = "a bias, which transformers' BitNet layer would multiply with the weight's scale"
                what = what if bias is not None else f"{rows} output features, no multiple of 4"
                raise ValueError(
                    f"`export_format='bitnet'` cannot hold module {name!r}: it has {what}. Use "
                    "`export_format='compressed-tensors'`, or leave the module out with `exclude_modules`."
                )

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """LoRA replicates layers here; there is nothing to do."""

    def _create_and_replace(  # type: ignore[override]  # LoRA's has another configuration
        self,
        config: LowBitSRConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, LowBitSRLinear):
            target.update_layer(adapter_name, config=config, name=current_key)
            return
        linear: Any = target
        module = LowBitSRLinear(
            linear,
            adapter_name,
            config,
            current_key,
            self._source_checksum(current_key),
            is_fixed_point(self.model, target, config),
        )
        if adapter_name not in self.active_adapters:
            module.requires_grad_(False)
        self._replace_module(parent, target_name, module, target)

    # -- adapters

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a weighted sum of integers is on no grid.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Adapters of low-bit SR are integers, whose weighted sum is on no grid, so it would have to be rounded a "
            "second time. Use one of them, or LRQATConfig, whose adapters combine inside one rounding."
        )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter, or several that share no layer.

        Raises:
            ValueError: two of them have a layer in common. Nothing was changed then.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for layer in self.modules():
            if isinstance(layer, LowBitSRLinear):
                layer._the_one(names)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def train(self, mode: bool = True) -> LowBitSRModel:
        """As in both methods. Before an evaluation (False) it also warns if weights fill their grid."""
        if mode:
            leave_to_trainer()
        elif self.training:
            warn_of_full_grids(self)
        super().train(mode)
        return self

    # -- state dicts: `parts.py` has what is special

    @classmethod
    def _adapter_tensors(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        warn_of_full_grids(model)
        # the base class's own: LoRA's looks for DoRA in the configuration
        return super(LoraModel, cls)._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )

    @classmethod
    def _check_loaded(cls, model, config, adapter_name, state_dict):
        for name, layer in model.named_modules():
            if not isinstance(layer, LowBitSRLinear) or adapter_name not in layer.lowbitsr_weight:
                continue
            weight: Any = layer.lowbitsr_weight[adapter_name].weight
            for part, attribute in PARTS.items():
                found, here = state_dict.get(f"{name}.{part}.{adapter_name}"), getattr(weight, attribute)
                if found is not None and (found.shape, found.dtype) != (here.shape, here.dtype):
                    raise ValueError(
                        f"In the adapter file, '{part}' of module {name!r} is {found.dtype} {tuple(found.shape)}, but "
                        f"this model needs {here.dtype} {tuple(here.shape)}: the adapter was made for another grid or "
                        "architecture. Load it on the model, with the configuration, that it was trained with."
                    )
            codes = state_dict.get(f"{name}.lowbitsr_codes.{adapter_name}")
            if codes is not None:
                config.check_codes(name, codes, weight.shape[1])
