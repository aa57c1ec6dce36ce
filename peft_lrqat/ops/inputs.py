"""What a layer takes: the checks that torch's own layers make, which no operation on packed words can make for them.

A row of packed words does not say how many of its codes count, so a product with an input that is too narrow would
quietly use the first columns. Every layer, adapted or merged, calls `linear_input` first, or `check_ids`, or, where it
rounds its input, what `shared_inputs.py` has.
"""

from __future__ import annotations

from typing import Any

import torch

from .dispatch import in_autocast_dtype

# The weight is built in the input's dtype. It need not be the model's: FSDP2's mixed precision casts inputs and float
# parameters, but not integers, which say nothing of the dtype.
_FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def linear_input(x: torch.Tensor, layer: Any) -> torch.Tensor:
    """Check the input of a linear layer, and cast it to autocast's dtype, if autocast is on.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64.
        layer: has `in_features` and `out_features`.

    Raises:
        RuntimeError: another shape or dtype, as nn.Linear raises it.
    """
    check_linear_input(x, layer)
    return in_autocast_dtype(x)


def check_linear_input(x: torch.Tensor, layer: Any) -> None:
    """Check the input of a linear layer, as `linear_input` does."""
    if x.dtype not in _FLOATS or not x.ndim or x.shape[-1] != layer.in_features:
        _refuse(x, layer)


def check_ids(ids: torch.Tensor) -> None:
    """Raise RuntimeError unless these are indices that nn.Embedding takes: int64 or int32."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"An embedding takes indices of dtype torch.int64 or torch.int32, not {ids.dtype}.")


def _refuse(x: torch.Tensor, layer: Any) -> None:
    takes = f"in_features={layer.in_features}, out_features={layer.out_features}"
    if x.dtype not in _FLOATS:
        raise RuntimeError(f"The input of a linear layer ({takes}) is {x.dtype}; it must be of a float dtype.")
    raise RuntimeError(
        f"The input has shape {tuple(x.shape)}, but the last dimension of this layer's input ({takes}) must be "
        f"{layer.in_features}."
    )
