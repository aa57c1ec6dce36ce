"""Adapters that PEFT makes without values (`low_cpu_mem_usage=True`), and what is said to who trains one.

PEFT makes the parameters of an adapter on the meta device where those of a file are to take their places. Whether a
file follows is not known when the adapter is made: `from_pretrained` and `set_peft_model_state_dict` bring one,
`get_peft_model` does not.
"""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from torch import nn


def warn_of_no_values(adapter: str, config: Any) -> None:
    """Warn that a new adapter is made without values."""
    if not config.is_new:
        return
    warnings.warn(
        f"`low_cpu_mem_usage=True` makes adapter {adapter!r} without values: its tensors are to be loaded next. To "
        "train a new adapter, leave `low_cpu_mem_usage` out.",
        stacklevel=2,
    )


_WHY = (
    "made with `low_cpu_mem_usage=True`, which is for adapters that are loaded. Load its tensors "
    "(`set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)`); to train a new adapter, adapt a fresh copy "
    "of the float model without `low_cpu_mem_usage`."
)


def refuse_unfilled(adapters: list[str], layer: str) -> NoReturn:
    """Raise ValueError: one of these adapters of a layer has no values, and is to be computed with or merged."""
    names = ", ".join(map(repr, adapters))
    raise ValueError(f"Adapter {names} has no values in layer {layer!r}: it was {_WHY}")


def check_saved_values(adapter: str, layers: dict[str, nn.Module]) -> None:
    """Raise ValueError if an adapter of some layers (by name) is to be saved, and has no values in one of them."""
    for layer, module in layers.items():
        for name, parameter in module.named_parameters():
            if parameter.is_meta and adapter in name.split("."):
                raise ValueError(
                    f"Adapter {adapter!r} cannot be saved: it has no values, e.g. in layer {layer!r}. It was {_WHY}"
                )


def check_filled(model: nn.Module) -> None:
    """Raise ValueError if a trained parameter of a model has no values."""
    empty = [name for name, p in model.named_parameters() if p.requires_grad and p.is_meta]
    if empty:
        raise ValueError(
            f"{len(empty)} parameters that would be trained have no values, e.g. {empty[0]!r}: the adapter was {_WHY}"
        )
