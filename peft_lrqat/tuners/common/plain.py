"""Whether a layer computes what its class says: conversion replaces it by one that does that, and nothing else.

Hooks around forward and backward are kept (`modules/carry.py`), and so are attributes that users have set. What changes
the product itself has no place inside the rounding, and is refused by name: a `forward` of its own, parametrizations
and masks, further tensors, hooks that see the layer's state dict, whose tensors are others now.

Of transformers' subclasses of nn.Linear, FalconLinear computes what nn.Linear does, and EsmFoldLinear only initializes
otherwise; Llama4Router and PhimoeTopKRouter choose experts, DeepseekV4GroupedLinear multiplies in blocks, and
IdeficsDecoupledLinear has a second weight. Of its embeddings, those called ...ScaledWordEmbedding multiply the rows
with `embed_scale`; others shift positions, normalize, or look up twice.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ...modules.experts import ExpertStack
from ...modules.packed import MERGED
from .staying import takes_away

_PLAIN = (nn.Linear.forward, Conv1D.forward, nn.Embedding.forward, ExpertStack.forward)

# Classes whose forward is written anew, to the same effect.
_SAME = ("FalconLinear",)

_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

# Set on a converted layer, not taken from the old one: attributes of torch's classes, accelerate's hooks, and ours.
_OWN = {*vars(nn.Module()), *vars(nn.Embedding(1, 1, device="meta")), "in_features", "out_features", "nf", "nx"}
_OWN |= {"embed_scale", "forward", "_old_forward", "_hf_hook"}
_OWN |= {"bits", "grid", "compute_dtype", "qweight", "weight_zero_point", "experts"}


def scales_rows(module: nn.Module) -> bool:
    """Whether a module is one of transformers' embeddings that multiply what they have looked up with `embed_scale`."""
    return isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding")


def has_own_forward(module: nn.Module) -> bool:
    """Whether a linear layer or embedding computes something else than its torch class; a merged layer does not."""
    if isinstance(module, MERGED):
        return False
    kind = type(module)
    known = kind.forward in _PLAIN or kind.__name__ in _SAME or scales_rows(module)
    # accelerate's hook wraps `forward`, and is carried over
    own = vars(module).get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    return not known or getattr(own, "__func__", kind.forward if own is None else None) is not kind.forward


def check_plain(module: nn.Module, where: str) -> None:
    """Raise ValueError if a module computes, or holds, what its converted form would not."""
    if parametrize.is_parametrized(module):
        kinds = [type(p).__name__ for ps in module.parametrizations.values() for p in ps]  # type: ignore[operator]
        _refuse(
            where,
            f"has parametrized tensors ({', '.join(kinds)})",
            "Make them plain with `torch.nn.utils.parametrize.remove_parametrizations`",
        )
    expected = {"weight", "bias", "embed_scale"} if scales_rows(module) else {"weight", "bias"}
    tensors: dict[str, Any] = {**module._parameters, **module._buffers, **module._modules}
    further = sorted(name for name, value in tensors.items() if value is not None and name not in expected)
    if further and not isinstance(module, MERGED):
        _refuse(
            where,
            f"holds {', '.join(map(repr, further))} beside weight and bias",
            "Make it a plain layer (pruning: `torch.nn.utils.prune.remove`; weight_norm, spectral_norm: "
            "`torch.nn.utils.remove_weight_norm`, `remove_spectral_norm`)",
        )
    if has_own_forward(module):
        _refuse(where, "has a `forward` of its own", "Replace it by a plain layer")
    if hooks := [name for name in _STATE_HOOKS if vars(module).get(name)]:
        _refuse(where, f"has hooks of its state dict ({', '.join(hooks)})", "Remove them")


def offloads(module: nn.Module) -> bool:
    """Whether accelerate keeps the parameters of a module itself somewhere else, and brings them in for every call."""
    return takes_away(getattr(module, "_hf_hook", None))


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate offloads any module of a model."""
    return any(map(offloads, model.modules()))


def check_not_offloaded(module: nn.Module, where: str) -> None:
    """Raise ValueError if accelerate keeps a module's weight somewhere else."""
    if offloads(module):
        _refuse(
            where,
            "is offloaded by accelerate, which loads its weight for every call",
            "Load the model without offloading to the CPU or to disk",
        )


def _refuse(where: str, what: str, how: str) -> None:
    raise ValueError(
        f"{where} {what}, which would be lost when it is converted. {how} before adapting the model, or leave the "
        "module out with `exclude_modules`."
    )


def user_attributes(module: nn.Module) -> dict[str, Any]:
    """What users have set on a layer: its attributes without torch's, accelerate's and ours."""
    own = _OWN | getattr(type(module), "description", frozenset())
    return {name: value for name, value in vars(module).items() if name not in own}
