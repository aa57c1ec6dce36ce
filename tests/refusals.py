"""Models that cannot be adapted, and the proof that an error left a model, its configuration and ours as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft.helpers import rescale_adapter_scale
from torch import nn
from transformers import PreTrainedModel


def poisoned(value: float) -> Callable[[PreTrainedModel], PreTrainedModel]:
    def make(model: PreTrainedModel) -> PreTrainedModel:
        # the last module that would be converted: all others come before it
        model.model.layers[-1].mlp.down_proj.weight.data[3, 5] = value
        return model

    return make


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[-1].mlp.down_proj.to("meta")
    return model


def in_dtype(dtype: torch.dtype) -> Callable[[PreTrainedModel], PreTrainedModel]:
    def make(model: PreTrainedModel) -> PreTrainedModel:
        layer = model.model.layers[-1].mlp.down_proj
        layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
        return model

    return make


def says_quantized(model: PreTrainedModel) -> PreTrainedModel:
    model.config.quantization_config = {"quant_method": "gptq"}
    return model


def without_features(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[-1].mlp.down_proj = nn.Linear(0, 32)
    return model


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
# What PEFT itself writes to a configuration before a tuner sees it.
_PEFTS_OWN = ("base_model_name_or_path", "inference_mode")


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.detach().contiguous().view(torch.uint8) if value.ndim else value.detach()  # NaN is NaN, bit by bit


class _AsItWas:
    """A model: the same objects in the same places, with the same values, flags and settings."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        self.values = {name: _bits(t).clone() for name, t in self.tensors.items() if not t.is_meta}
        self.trained = {name: t.requires_grad for name, t in self.tensors.items()}
        self.training = {name: module.training for name, module in self.modules.items()}
        self.hooks = {(name, kind): list(getattr(m, kind)) for name, m in self.modules.items() for kind in _HOOKS}
        self.names = {name: set(vars(module)) for name, module in self.modules.items()}
        self.settings = self._settings()

    def _settings(self) -> dict[str, Any]:
        config = getattr(self.model, "config", None)
        return {
            "config": repr(config.to_dict()) if hasattr(config, "to_dict") else config,
            "peft_config": {name: id(c) for name, c in getattr(self.model, "peft_config", {}).items()},
            "loss": getattr(self.model, "loss_function", None),
            "adapters of transformers": getattr(self.model, "_hf_peft_config_loaded", None),
        }

    def check(self) -> None:
        now = _AsItWas(self.model)
        for kind in ("modules", "tensors"):
            before, after = getattr(self, kind), getattr(now, kind)
            assert before.keys() == after.keys()
            assert all(before[name] is after[name] for name in before), kind
        assert all(torch.equal(now.values[name], value) for name, value in self.values.items())
        for kind in ("trained", "training", "hooks", "names", "settings"):
            assert getattr(now, kind) == getattr(self, kind), kind


def _fields(config: Any) -> dict[str, str]:
    return {name: repr(value) for name, value in vars(config).items() if name not in _PEFTS_OWN}


@contextmanager
def refused(
    model: nn.Module, match: str, error: type[BaseException] = ValueError, config: Any = None
) -> Iterator[None]:
    """An error that matches, after which the model and the user's configuration object are what they were."""
    before = _AsItWas(model)
    fields = None if config is None else _fields(config)
    with pytest.raises(error, match=match):
        yield
    before.check()
    assert fields is None or _fields(config) == fields


def check_no_factor(model: Any, layer: Any, match: str) -> None:
    """PEFT's ways to multiply an adapter are refused with these words, and those that change nothing are not."""
    changes: tuple[Callable[[], Any], ...] = (
        lambda: rescale_adapter_scale(model, 0.5).__enter__(),
        lambda: layer.set_scale("default", 0.5),
        lambda: layer.scale_layer(2.0),
        lambda: layer.unscale_layer(0.5),
    )
    for change in changes:
        with pytest.raises(ValueError, match=match):
            change()
    layer.set_scale("default", 1)
    layer.scale_layer(1.0)
    layer.unscale_layer()
