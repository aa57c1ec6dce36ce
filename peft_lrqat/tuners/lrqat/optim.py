"""Parameter groups for LR-QAT."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..common.rules import NOT_NEGATIVE, check_value


def create_lrqat_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    scale_lr: float | None = None,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """Make an optimizer with the scales in a parameter group of their own, for `Trainer(optimizers=(optimizer, None))`.

    The Trainer's own optimizer is fine as well: scales are trained as relative changes, which the adapter's learning
    rate suits. But weight decay would pull fixed scales of inputs (`act_scale="static"`) towards 1.

    Args:
        model (nn.Module): a PeftModel with LR-QAT adapters.
        optimizer_cls (type[Optimizer]): a torch optimizer's class.
        lr (float): learning rate of `lora_A`, `lora_B` and everything else that is trained (`modules_to_save`, biases).
        scale_lr (float | None): learning rate of the *relative* change of the scales, and of fixed scales of inputs.
            None: `lr`.
        weight_decay (float): of everything but scales, biases and vectors.
        **kwargs (Any): passed to the optimizer (`betas`, `eps`, `fused` ...).

    Returns:
        The optimizer. Its parameter groups are matrices, vectors and biases, and scales; an empty one is left out.

    Raises:
        ValueError: the model has no LR-QAT adapter that is trained, or a rate is no number of 0 or more.

    Examples:
        >>> from peft_lrqat import create_lrqat_optimizer
        >>> optimizer = create_lrqat_optimizer(model, lr=1e-3, scale_lr=1e-4, weight_decay=0.01)
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.001, 0.0001]
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` is a {type(model).__name__}; it must be a PeftModel with LR-QAT adapters.")
    if not callable(optimizer_cls):
        raise ValueError(f"`optimizer_cls` is {optimizer_cls!r}; it must be a class, such as torch.optim.AdamW.")
    for option, value in (("lr", lr), ("scale_lr", scale_lr), ("weight_decay", weight_decay)):
        if not isinstance(value, torch.Tensor) and not (option == "scale_lr" and value is None):
            check_value(option, value, NOT_NEGATIVE)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_scales = ("lora_scale_shift", "lora_act_scale")
    if not any(part in name for part in ("lora_A", *of_scales) for name in named):
        raise ValueError(
            "`model` has no trainable LR-QAT adapter. Make it with get_peft_model(model, LRQATConfig(...)), and load "
            "saved adapters with is_trainable=True."
        )
    scales = [p for name, p in named.items() if any(part in name for part in of_scales)]
    rest = {name: p for name, p in named.items() if not any(part in name for part in of_scales)}
    decayed = [p for name, p in rest.items() if p.ndim > 1 and not name.endswith("bias")]
    plain = [p for name, p in rest.items() if p.ndim <= 1 or name.endswith("bias")]
    groups = [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": plain, "lr": lr, "weight_decay": 0.0},
        {"params": scales, "lr": lr if scale_lr is None else scale_lr, "weight_decay": 0.0},
    ]
    make: Any = optimizer_cls  # torch's base class does not declare `lr`
    return make([group for group in groups if group["params"]], lr=lr, **kwargs)
