"""Which layers `target_modules` means, and warnings about those that it does not reach."""

from __future__ import annotations

import re
import warnings
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...arguments import nearest
from ...modules.experts import Experts, projections
from ...modules.packed import MERGED
from .config import ALL_LINEAR
from .plain import has_own_forward


def left_out(model: nn.Module) -> list[str]:
    """Names of the layers that 'all-linear' leaves out because they compute something else than their class does."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and has_own_forward(module)
    ]


def inside_experts(model: nn.Module) -> set[str]:
    """Names of the layers of single experts in a merged model, which are trained together or not at all."""
    return {
        f"{name}.{inner}"
        for name, module in model.named_modules()
        if isinstance(module, Experts) and not module.stacks
        for inner, _ in module.named_modules()
        if inner
    }


def inside_extras(model: nn.Module) -> set[str]:
    """Names of the layers that an adapter trains in float (`modules_to_save`), and of those that these stand for."""
    return {
        f"{name}.{inner}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for inner, _ in module.named_modules()
        if inner
    }


# What chooses experts, or weighs the shared one, is called so beside them.
_ROUTER = re.compile(r"gate|.*router.*|.*expert.*_gate")


def routers(model: nn.Module) -> set[str]:
    """Names of the linear layers by which a mixture chooses its experts or weighs a shared one.

    They are a thousandth of its weights, decide on all others, and engines read them as floats: 'all-linear' leaves
    them out, whatever kind of module an architecture has them in.
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        if not any(_holds_experts(child_name, child) for child_name, child in module.named_children()):
            continue
        for child_name, child in module.named_children():
            if _ROUTER.fullmatch(child_name):
                linear = (inner for inner, layer in child.named_modules() if isinstance(layer, nn.Linear))
                found.update(".".join(filter(None, (name, child_name, inner))) for inner in linear)
    return found


def _holds_experts(name: str, module: nn.Module) -> bool:
    return (
        name == "experts"
        or isinstance(module, Experts)
        or ("Experts" in type(module).__name__ and bool(projections(module)))
    )


def tell_left_out(model: nn.Module) -> None:
    """Warn of what `left_out` finds."""
    if names := left_out(model):
        kinds = sorted({type(model.get_submodule(name)).__name__ for name in names})
        warnings.warn(
            f"`target_modules='all-linear'` leaves {len(names)} layers out ({', '.join(kinds)}, e.g. {names[0]!r}), "
            "because they have a `forward` of their own, which cannot be kept: they stay float.",
            stacklevel=2,
        )


def check_names(model: nn.Module, config: Any) -> None:
    """Warn where some of `target_modules` name nothing, and raise ValueError where all of them do.

    PEFT raises there, too, but does not know what there is.
    """
    wanted = config.target_modules
    if config.inference_mode or not wanted:
        return
    named = dict(model.named_modules())
    if isinstance(wanted, str):
        if wanted != ALL_LINEAR and nearest(wanted.replace("_", "-"), [ALL_LINEAR]):
            raise ValueError(f"`target_modules` is {wanted!r}. Did you mean {ALL_LINEAR!r}?")
        if wanted != ALL_LINEAR and not any(re.fullmatch(wanted, name) for name in named):
            raise ValueError(
                f"`target_modules` is {wanted!r}. A string is a regular expression for whole names, such as "
                f"'model.layers.0.self_attn.q_proj', and this one fits none. Names are given as a list: "
                f"{[part.strip() for part in wanted.split(',')]}."
            )
        return
    unknown = [one for one in sorted(wanted) if not any(name == one or name.endswith("." + one) for name in named)]
    if len(unknown) == len(wanted) and not getattr(config, "target_parameters", None):
        adapted = tuple(f"{name}." for name, module in named.items() if isinstance(module, BaseTunerLayer))
        kinds = (nn.Linear, Conv1D, BaseTunerLayer, *MERGED)
        linear = {
            name.rpartition(".")[2]
            for name, module in named.items()
            if isinstance(module, kinds) and not name.startswith(adapted)
        }
        raise ValueError(
            f"`target_modules` is {sorted(wanted)}, but no module of this model is called so. Its linear layers are "
            f"called {', '.join(map(repr, sorted(linear))) or 'nothing (there are none)'}. Leave `target_modules` out "
            "to target all of them but the output layer."
        )
    if unknown:
        warnings.warn(
            f"`target_modules` names {', '.join(map(repr, unknown))}, but no module of this model is called so. What "
            "was meant stays float: look for a typing error, or leave the name out.",
            stacklevel=2,
        )
