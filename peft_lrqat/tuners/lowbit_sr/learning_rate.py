"""A warning where the learning rate would take a pretrained model apart.

AdamW, and rules like it, move every weight by about the learning rate in each step, whatever the gradient's size. So
the rate over the weights' size says how much of a trained weight a step replaces, on any grid, and the rate over the
grid step how many of the codes flip. Full fine-tuning takes rates that move weights by some thousandths of their size;
LR-QAT's rates, which are meant for low-rank factors, move them by some hundredths, and six such steps have ruined a
model.

Ternary weights are left out: their first rounding has taken the model apart already, and what they want is a rate as
from scratch (docs/guides/low-bit-sr.md).
"""

from __future__ import annotations

import warnings
from statistics import median
from typing import Any

import torch
from torch.optim import Optimizer

from ...grid import dequantize, rows_of
from ...packing import unpack

# of the weights' size in a step
_FAR_TOO_MUCH = 0.01

_CHECKED = "_peft_lrqat_rate_checked"


@torch.no_grad()
def check_rate(optimizer: Optimizer) -> None:
    """Warn, once for an optimizer, if its learning rate is far above what fine-tuning takes.

    It looks at weights that were pretrained (`LowBitTensor.fine_tunes`) and are not ternary, and at rules with
    `betas`, whose updates are about as large as the rate. A scheduler's highest rate counts, also while it warms up.
    """
    if optimizer.__dict__.get(_CHECKED):
        return
    setattr(optimizer, _CHECKED, True)
    for group in optimizer.param_groups:
        weights: list[Any] = [p for p in group["params"] if getattr(p, "fine_tunes", False) and not p.grid.ternary]
        if not weights or "betas" not in group:
            continue
        some = weights[:: max(1, len(weights) // 16)]
        size = median(_size(weight) for weight in some)
        step = median(float(weight.scale.abs().median()) for weight in some)
        rate = max(float(group["lr"]), float(group.get("initial_lr", 0))) * float(group.get("d", 1))  # d: Prodigy's
        if group.get("lr_unit") == "grid":
            rate *= step
        if size > 0 and rate > _FAR_TOO_MUCH * size:
            warnings.warn(
                "The learning rate of low-bit weights is far above what fine-tuning takes: a step of "
                f"{type(optimizer).__name__} moves each of them by about {rate:.2g}, which is {100 * rate / size:.2g} "
                f"% of their size ({size:.2g}) and {rate / step:.2g} steps of their grid. Rates of 3e-5 (8 bits) and "
                "1e-4 (4 bits) were good (docs/guides/low-bit-sr.md); LR-QAT's, 1e-3, is for low-rank factors.",
                stacklevel=2,
            )
            return


def _size(weight: Any) -> float:
    """The root mean square of a low-bit weight's first rows."""
    rows = slice(0, 64)
    codes = unpack(weight.packed[rows], weight.grid.code_bits, weight.shape[1])
    return float(dequantize(codes, rows_of(weight.scale, rows), None, torch.float32).square().mean().sqrt())
