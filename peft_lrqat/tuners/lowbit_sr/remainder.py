"""What error feedback keeps of a rounding, where the learning rate changes."""

from __future__ import annotations

from typing import Any

import torch

from ...ops.reference_step import DIRECTION, MOMENTUM

#: A learning rate, as torch takes it.
Rate = float | torch.Tensor


def scale_remainder(state: dict[str, Any], lr: Rate, last_lr: Rate | None) -> None:
    """Scale the momentum by last_lr / lr where the learning rate has risen.

    Error feedback keeps what a rounding lost divided by the learning rate of that step, and the next step multiplies by
    its own: after a warm restart, or in a second stage, it would come back many times larger than it was. Where the
    rate falls, what comes back is smaller than what was lost, which does no harm.
    """
    if last_lr is None:
        return
    names = (f"{name}{part}" for name in (DIRECTION, MOMENTUM) for part in ("", "_unit"))
    momentum = next(state[name] for name in names if name in state)
    if isinstance(lr, torch.Tensor) or isinstance(last_lr, torch.Tensor):
        # on the device: asking whether the rate rose would wait for it
        lr, last_lr = (torch.as_tensor(rate, dtype=torch.float32, device=momentum.device) for rate in (lr, last_lr))
        momentum.mul_(torch.where(lr > last_lr, last_lr / lr, 1.0))
    elif lr > last_lr:
        momentum.mul_(last_lr / lr)


def last_positive(lr: Rate, last_lr: Rate | None) -> Rate | None:
    """The rate by which remainders were divided last; with a rate of 0, nothing is fed back."""
    if isinstance(lr, torch.Tensor):
        lr = lr.detach().clone()
        return (
            lr
            if last_lr is None
            else torch.where(lr > 0, lr, torch.as_tensor(last_lr, dtype=lr.dtype, device=lr.device))
        )
    return lr if lr > 0 else last_lr
