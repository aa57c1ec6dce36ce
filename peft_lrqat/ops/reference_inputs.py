"""How engines round a layer's input. The reference of `kernels/inputs.py`.

Engines differ in how many steps the largest magnitude takes, in the dtype that they compute in and in their order of
operations, so each rule is written as its engine writes it. What is trained is then what is served, to the last bit:

    rule                 runs it                                          steps           computes in
    compressed-tensors   transformers, with compressed-tensors            127.5 or 7.5    x's dtype
    bitnet               transformers' `AutoBitLinear`                    127             fp32
    vllm                 vLLM's int8 products (W8A8) on CUDA              127 or 7        fp32
    humming              vLLM's products with packed weights, by the      127 or 7        fp32
                         package humming-kernels; its int8 products
                         on a CPU
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The rules, by whose they are. Those of a checkpoint format have its name.
ACTIVATION_RULES = ("compressed-tensors", "bitnet", "vllm", "humming")

#: `Activations.group_size` where all inputs of a token share a scale.
PER_TOKEN = -1


def rule_steps(rule: str, bits: int) -> float:
    """How many steps the largest magnitude takes by a rule."""
    return 2.0 ** (bits - 1) - (0.5 if rule == "compressed-tensors" else 1.0)


def rounded_inputs(x: Tensor, rule: str, bits: int, group_size: int) -> Tensor:
    """Compute what `round_activations` returns. The reference of the kernel.

    Args:
        x: (..., in).
        rule, bits, group_size: as in `Activations`.
    """
    parts = x if group_size == PER_TOKEN else x.unflatten(-1, (-1, group_size))
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    largest = parts.float().abs().amax(dim=-1, keepdim=True) if x.numel() else parts.float()
    steps = largest.new_full((), rule_steps(rule, bits))  # a tensor: torch makes products of quotients by numbers
    if rule == "compressed-tensors":  # it keeps the scale in the activations' dtype, and computes in it
        scale = (largest / steps).to(x.dtype)
        scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
        rounded = (parts / scale).round().clamp(low, high) * scale
    elif rule == "bitnet":  # the operations, in the order, of transformers' `ActQuant`
        inverse = rule_steps(rule, bits) / largest.clamp(min=1e-5)
        rounded = (parts.float() * inverse).round().clamp(low, high) / inverse
    elif rule == "vllm":  # `dynamic_scaled_int8_quant`
        inverse = torch.where(largest == 0, 0.0, steps / largest)
        rounded = (parts.float() * inverse).round().clamp(low, high) * (largest / steps)
    else:  # humming's `quant_group`
        scale = (largest / steps).clamp(min=1e-30)
        rounded = (parts.float() * (1 / scale)).round().clamp(low, high) * scale
    return rounded.to(x.dtype).reshape(x.shape)
