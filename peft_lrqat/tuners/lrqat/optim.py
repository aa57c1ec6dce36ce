"""Parameter groups for LR-QAT."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def create_lrqat_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    scale_lr: float | None = None,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer with the scales in a group of their own, for `Trainer(optimizers=(optimizer, None))`.

    Args:
        model: a PeftModel with LR-QAT adapters.
        optimizer_cls: any torch optimizer class.
        lr: learning rate of lora_A, lora_B and everything else that is trained (`modules_to_save`, biases).
        scale_lr: learning rate of the scale shifts, the *relative* change of the scales, and of fixed scales of
            activations; None: `lr`.
        weight_decay: for all but the scales, biases and vectors.
        **kwargs: passed to the optimizer (betas, eps, fused ...).

    Raises:
        ValueError: the model has nothing to train, or no LR-QAT adapter.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any("lora_A" in name for name in named):
        raise ValueError(
            "`model` has no trainable LR-QAT adapter. Make it with get_peft_model(model, LRQATConfig(...)), and load "
            "saved adapters with is_trainable=True."
        )
    of_scales = ("lora_scale_shift", "lora_act_scale")
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
