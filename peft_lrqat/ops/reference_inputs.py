"""How engines round a layer's input. The reference of `kernels/inputs.py` and `kernels/static_inputs.py`.

Engines differ in how many steps the largest magnitude takes, in the dtype that they compute in and in their order of
operations, so each rule is written as its engine writes it. What is trained is then what is served, to the last bit:

    rule                 runs it                                          steps           computes in
    compressed-tensors   transformers, with compressed-tensors            127.5 or 7.5    x's dtype
    bitnet               transformers' `AutoBitLinear`                    127             fp32
    vllm                 vLLM's int8 products (W8A8) on CUDA              127 or 7        fp32
    humming              vLLM's products with packed weights, by the      127 or 7        fp32
                         package humming-kernels; its int8 products
                         on a CPU

With a fixed scale there is compressed-tensors' rule alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..grid import snap_scale

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
    low, high = _ends(bits)
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


def input_scale(log2: Tensor, scale_dtype: str) -> Tensor:
    """Compute the fixed scale that a checkpoint stores.

    In fp64: whatever device computes it, the fp32 number that is snapped is the same.

    Args:
        log2: (1,), any float dtype: log2 of the scale before it is snapped.
        scale_dtype: what it is snapped to, see `grid.snap_scale`.

    Returns:
        fp32 (1,), units of the input per grid step.
    """
    return snap_scale(log2.double().exp2().float(), scale_dtype)


def rounded_static(x: Tensor, scale: Tensor, bits: int, scale_dtype: str | None = None) -> Tensor:
    """Compute what `round_static` and `round_learned` return. The reference of the kernel.

    Args:
        x, bits: as there.
        scale: (1,), any float dtype: the scale itself, or log2 of it.
        scale_dtype: None: the scale itself; else log2 of it, and what it is snapped to.
    """
    step = _step(scale, scale_dtype).to(x.dtype)
    return (x / step).round().clamp(*_ends(bits)) * step


def static_gradients(
    dy: Tensor, x: Tensor, scale: Tensor, bits: int, scale_dtype: str | None, need_x: bool, need_scale: bool
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the input, and of the scale or log2 of it. The reference of the kernel.

    Args:
        dy: x's shape and dtype.
        x, scale, bits, scale_dtype: as in `rounded_static`.
        need_x, need_scale: which gradients are needed.

    Returns:
        dx, in dy's dtype, and that of `scale`, in its dtype and of its shape; empty where one is not needed.
    """
    low, high = _ends(bits)
    step = _step(scale, scale_dtype)
    levels = x / step.to(x.dtype)
    rounded = levels.round()
    inside = (rounded >= low) & (rounded <= high)
    dx = dy * inside if need_x else dy.new_empty(0)
    if not need_scale:
        return dx, scale.new_empty(0)
    slope = torch.where(inside, rounded - levels, rounded.clamp(low, high))
    dscale = (dy.float() * slope.float()).sum().view(scale.shape)
    if scale_dtype is not None:  # d scale / d log2, straight through the snapping
        dscale = dscale * step * math.log(2)
    return dx, dscale.to(scale.dtype)


def _step(scale: Tensor, scale_dtype: str | None) -> Tensor:
    return scale if scale_dtype is None else input_scale(scale, scale_dtype)


def _ends(bits: int) -> tuple[float, float]:
    return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
