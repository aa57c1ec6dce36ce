"""Full-parameter methods for `gpu.py`: what trains the weights of every linear layer but the head.

Embeddings, norms and the head are frozen for all of them, so that the rows differ by the linear layers' weights,
gradients and optimizer states only. Peers come from their own packages: torch, torchao.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

# name -> (kind, bits and LowBitAdamW's state)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "low-bit SR int4, factored": ("lowbit", {"bits": 4, "state": "factored"}),
    "low-bit SR int4, 8-bit state": ("lowbit", {"bits": 4, "state": "8bit"}),
    "low-bit SR int8, factored": ("lowbit", {"bits": 8, "state": "factored"}),
    "low-bit SR int8, 8-bit state": ("lowbit", {"bits": 8, "state": "8bit"}),
    "torchao int8 training, AdamW8bit": ("torchao", {}),
    "full bf16, AdamW": ("bf16", {}),
}
KINDS = {kind for kind, _ in METHODS.values()}


def missing(kind: str) -> str | None:
    """The package that a kind needs and that is not there."""
    needs = {"torchao": "torchao", "qlora": "bitsandbytes"}.get(kind)
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


def full_optimizer(kind: str, options: dict[str, Any], trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What goes with the model; low-bit SR's updates each weight in backward and frees its gradient."""
    if kind == "lowbit":
        from peft_lrqat import LowBitAdamW

        return LowBitAdamW(trained, lr=1e-4, weight_decay=0.0, state=options["state"], fused_backward=True)
    if kind == "torchao":
        from torchao.optim import AdamW8bit

        return AdamW8bit(trained, lr=1e-4, weight_decay=0.0)
    return torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
