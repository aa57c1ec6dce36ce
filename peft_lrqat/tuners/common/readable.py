"""A layer's weight, for modules that read it instead of calling the layer.

`nn.MultiheadAttention` reads `out_proj.weight`, Mamba reads `dt_proj.weight` (its kernels those of all projections),
T5 asks `wo.weight` for its dtype. What they get is W^, the weight that merging stores, and it is differentiable: an
adapter is trained through it as it is when the layer is called. How long the dense weight lives is up to the reader.

The gradient. A layer's product knows how to take a gradient dY to what is trained, and with the identity as its input,
y = W^T, so dY = G^T is all that it takes: one more product in backward, and no second formula. The values themselves
are built from the integers, because a product may be rounded (TF32).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops.activations import Activations
from ...ops.dispatch import refuse_second_derivatives
from ...read_only import ReadOnlyTensor

_WHY_READ_ONLY = (
    "The layer is adapted: its weight is built from integers and the adapter. Change the adapter, or the float model "
    "before it is adapted."
)


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, product: Callable[..., Tensor], *trained: Tensor | None) -> Tensor:
        ctx.product = product
        ctx.save_for_backward(*trained)
        return ReadOnlyTensor(values, _WHY_READ_ONLY)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        refuse_second_derivatives()
        needs = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            trained = [
                None if t is None else t.detach().requires_grad_(need)
                for t, need in zip(ctx.saved_tensors, needs, strict=True)
            ]
            y = ctx.product(torch.eye(grad.shape[1], dtype=grad.dtype, device=grad.device), *trained)
        wanted = [t for t, need in zip(trained, needs, strict=True) if need and t is not None]
        # unused: a scale that a ternary projection has replaced
        grads = iter(torch.autograd.grad(y, wanted, grad.t(), allow_unused=True))
        return None, None, *(next(grads) if need else None for need in needs)


@torch.compiler.disable  # a graph break, where a compiled model reads
def readable_weight(values: Tensor, product: Callable[..., Tensor], *trained: Tensor | None) -> Tensor:
    """Give W^ for reading.

    Args:
        values: W^, (out, in), without a graph.
        product: (x, *trained) -> x W^T: x (..., in) to (..., out), differentiable in `trained`.
        trained: what W^ depends on.

    Returns:
        (out, in), values' dtype; differentiable in `trained`, and read-only.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        return _Weight.apply(values, product, *trained)
    return ReadOnlyTensor(values, _WHY_READ_ONLY)


def refuse_rounded_inputs(activations: Activations | None) -> None:
    """Raise ValueError if a weight is trained by reading it, in a layer whose inputs a checkpoint rounds."""
    if activations is not None:
        raise ValueError(
            f"`act_bits` is {activations.bits}, but the model reads the weight of an adapted layer instead of calling "
            "the layer (as nn.MultiheadAttention does with `out_proj`, Mamba with `dt_proj`), so its input is not "
            "rounded in training, and an engine would round it. Leave such layers out with `exclude_modules`, or leave "
            "`act_bits` out."
        )
