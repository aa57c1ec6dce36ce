"""Full-parameter methods for `gpu.py`: what trains the weights of every linear layer but the head.

Embeddings, norms and the head are frozen for all of them, so that the rows differ by the linear layers' weights,
gradients and optimizer states only. Peers come from their own packages: torch, torchao, bitsandbytes. "in backward": an
optimizer for each weight, which steps when the weight's gradient is complete and frees it, as low-bit SR's does
(torch's tutorial "How to save memory by fusing the optimizer step into the backward pass").
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

# name -> (kind, options: bits and LowBitAdamW's state; AdamW's state, and whether it steps in backward)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "low-bit SR int4, factored": ("lowbit", {"bits": 4, "state": "factored"}),
    "low-bit SR int4, 8-bit state": ("lowbit", {"bits": 4, "state": "8bit"}),
    "low-bit SR int8, factored": ("lowbit", {"bits": 8, "state": "factored"}),
    "low-bit SR int8, 8-bit state": ("lowbit", {"bits": 8, "state": "8bit"}),
    "torchao int8 training, AdamW8bit": ("torchao", {}),
    "torchao int8 training, AdamW8bit in backward": ("torchao", {"in_backward": True}),
    "full bf16, AdamW": ("bf16", {}),
    "full bf16, AdamW in backward": ("bf16", {"in_backward": True}),
    "full bf16, 8-bit AdamW": ("bf16", {"state": "8bit"}),
    "full bf16, 8-bit AdamW in backward": ("bf16", {"state": "8bit", "in_backward": True}),
}
KINDS = {kind for kind, _ in METHODS.values()}

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def missing(kind: str, options: dict[str, Any]) -> str | None:
    """The package that a method needs and that is not there."""
    needs = {"torchao": "torchao", "qlora": "bitsandbytes"}.get(kind)
    if kind == "bf16" and options.get("state") == "8bit":
        needs = "bitsandbytes"
    return needs if needs and importlib.util.find_spec(needs) is None else None


def full_model(kind: str, options: dict[str, Any], model: nn.Module, range_method: str) -> nn.Module:
    """`model` with the linear layers of its blocks trainable, and nothing else."""
    if kind == "lowbit":
        from peft import get_peft_model

        from peft_lrqat import LowBitSRConfig

        config = LowBitSRConfig(
            bits=options["bits"],
            group_size=-1,
            range_method=range_method,
            keep_base=False,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)
    model.requires_grad_(False)

    def wanted(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not name.endswith("lm_head")

    if kind == "torchao":
        from torchao.prototype import quantized_training
        from torchao.quantization import quantize_

        # its name before and since torchao 0.9
        config = getattr(quantized_training, "Int8WeightOnlyQuantizedTrainingConfig", None)
        config = config or quantized_training.int8_weight_only_quantized_training
        quantize_(model, config(), filter_fn=wanted)
    for name, module in model.named_modules():
        if wanted(module, name):
            module.weight.requires_grad_()
    model.enable_input_require_grads()  # as PEFT does: the first block's checkpoint needs an input with a gradient
    return model


class InBackward:
    """Optimizers, one for each weight, that step in backward: no two gradients are held at a time.

    It has what a training loop calls, and nothing is left to do there. The hooks do not keep it: Python's collector
    does not see references that torch's graph holds, and the weights would never be freed.
    """

    def __init__(
        self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], trained: list[nn.Parameter]
    ) -> None:
        self.each = {parameter: make([parameter]) for parameter in trained}
        arrived = weakref.WeakMethod(self._arrived)

        def hook(parameter: torch.Tensor) -> None:
            if (call := arrived()) is not None:
                call(parameter)

        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(hook)

    def _arrived(self, parameter: torch.Tensor) -> None:
        optimizer = self.each[parameter]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        pass

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


Stepper = torch.optim.Optimizer | InBackward


def full_optimizer(kind: str, options: dict[str, Any], trained: list[nn.Parameter]) -> Stepper:
    """What goes with the model; low-bit SR's updates each weight in backward and frees its gradient."""
    common = {"lr": 1e-4, "weight_decay": 0.0}
    if kind == "lowbit":
        from peft_lrqat import LowBitAdamW

        return LowBitAdamW(trained, **common, state=options["state"], fused_backward=True)
    make: Make
    if kind == "torchao":
        from torchao.optim import AdamW8bit

        make = partial(AdamW8bit, **common)
    elif options.get("state") == "8bit":
        from bitsandbytes.optim import AdamW8bit

        make = partial(AdamW8bit, **common)
    else:
        make = partial(torch.optim.AdamW, **common, fused=True)
    return InBackward(make, trained) if options.get("in_backward") else make(trained)
