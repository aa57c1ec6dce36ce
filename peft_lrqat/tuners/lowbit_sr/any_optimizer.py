"""How any `torch.optim.Optimizer` trains packed codes.

torch calls global hooks before and after the `step()` of every optimizer; ours are installed with the first low-bit
weight. Before it, each low-bit parameter in the optimizer's groups is replaced by a plain fp32 parameter with the same
values and the same gradient (and the optimizer's state follows); after it, the values are rounded into the codes, once,
and the groups are put back. So the rule itself does not matter, nor how it is implemented: in Python, `foreach`, fused,
compiled, in 8 bits. The same hook steps aside for optimizers that know packed codes (`handles_low_bit`).

The price is a transient fp32 copy of the low-bit weights during `step()`, beside the dense gradient and state that such
an optimizer keeps anyway. `LowBitAdamW` pays none of them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .growth import grow
from .learning_rate import check_rate

# attribute of an optimizer within `step()`: [(group, index, low-bit parameter, its float stand-in)]
_SWAPPED = "_peft_lrqat_swapped"
# attribute of an optimizer that was found to train ternary weights
_MENTIONED = "_peft_lrqat_latent_weights_mentioned"


@torch.compiler.disable  # of a compiled step: torch 2.13 cannot trace what packed codes are read by
@torch.no_grad()
def _before(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    check_rate(optimizer)
    if getattr(optimizer, "handles_low_bit", False):
        return
    _put_back(optimizer)  # if the last step raised in between
    inner = _of_inner_optimizers(optimizer)
    low_bit = [
        (group, index, parameter)
        for group in optimizer.param_groups
        for index, parameter in enumerate(group["params"])
        if hasattr(type(parameter), "round_from") and id(parameter) not in inner  # a `LowBitTensor`
    ]
    closure = any(callable(value) for value in (*args[1:], *kwargs.values()))  # it may make the gradients
    found = [(group, index, parameter) for group, index, parameter in low_bit if closure or parameter.grad is not None]
    if not found:
        return
    if any(parameter.error_feedback for _, _, parameter in found):
        raise ValueError(
            f"`error_feedback=True` puts the rounding remainder into the optimizer's momentum, which "
            f"{type(optimizer).__name__} knows nothing about. Use peft_lrqat.LowBitAdamW, or train with "
            "`error_feedback=False`."
        )
    if closure:
        raise ValueError(
            f"{type(optimizer).__name__}.step() was given a closure, which evaluates the model in the middle of the "
            "step, where low-bit weights have not been rounded yet. Call backward() first and step() without a "
            "closure; LBFGS and other line searches cannot train them: use torch.optim.AdamW or "
            "peft_lrqat.LowBitAdamW."
        )
    if callable(getattr(optimizer, "eval", None)):
        raise ValueError(
            f"{type(optimizer).__name__} has an `eval()`: it gives the model other weights between steps, as "
            "Schedule-Free does, and integers would be rounded every time. Use an optimizer that leaves weights alone "
            "between steps: peft_lrqat.LowBitAdamW, torch.optim.AdamW."
        )
    _mention_latent_weights(optimizer, [parameter for _, _, parameter in found])
    swapped: list[tuple[dict[str, Any], int, Any, nn.Parameter]] = []
    for group, index, parameter in found:
        stand_in = nn.Parameter(parameter.to_float(), parameter.requires_grad)
        stand_in.grad = parameter.grad
        group["params"][index] = stand_in
        if parameter in optimizer.state:
            optimizer.state[stand_in] = optimizer.state.pop(parameter)
        swapped.append((group, index, parameter, stand_in))
    setattr(optimizer, _SWAPPED, swapped)


def _of_inner_optimizers(optimizer: Optimizer) -> set[int]:
    """The identities of what a wrapper of other optimizers hands on to them.

    Their steps are intercepted, or know packed codes; they keep the state.
    """
    values = [
        v for value in vars(optimizer).values() for v in (value if isinstance(value, (list, tuple)) else (value,))
    ]
    inner = [value for value in values if isinstance(value, Optimizer)]
    return {id(parameter) for one in inner for group in one.param_groups for parameter in group["params"]}


def _mention_latent_weights(optimizer: Optimizer, parameters: list[Any]) -> None:
    """Say, once for an optimizer, that another one trains ternary weights much better."""
    if optimizer.__dict__.get(_MENTIONED) or not any(parameter.grid.ternary for parameter in parameters):
        return
    setattr(optimizer, _MENTIONED, True)
    warnings.warn(
        f"{type(optimizer).__name__} trains ternary weights, whose updates are rounded at random in every step. "
        "peft_lrqat.LowBitAdamW gives them latent weights, with which they train much better: hand it to the Trainer "
        "as `optimizer_cls_and_kwargs=LowBitAdamW.for_trainer(args)` (docs/guides/low-bit-sr.md, Ternary).",
        stacklevel=3,
    )


@torch.compiler.disable
def _after(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    for _, _, parameter, stand_in in getattr(optimizer, _SWAPPED, ()):
        parameter.round_from(stand_in.detach())
        grow(parameter)
    _put_back(optimizer)


def _put_back(optimizer: Optimizer) -> None:
    for group, index, parameter, stand_in in optimizer.__dict__.pop(_SWAPPED, ()):
        group["params"][index] = parameter
        if stand_in in optimizer.state:
            optimizer.state[parameter] = optimizer.state.pop(stand_in)


_installed = False


def install_hooks() -> None:
    """Register the hooks, once in a process: `tensor.py` does, with the first low-bit weight."""
    global _installed
    if not _installed:
        _installed = True
        register_optimizer_step_pre_hook(_before)
        register_optimizer_step_post_hook(_after)
