"""Triton kernels. Each function listed here has its reference's name, arguments and results (a test compares them).

References: `ops/reference.py`; of experts `ops/reference_experts.py`, of the optimizer step `ops/reference_step.py`, of
rounded inputs `ops/reference_inputs.py`, of a rounded cache `ops/reference_cache.py`, of scales that follow latent
weights `ops/latent.py`. Files:

tiles.py           what the kernels share: unpacking, Phi + B~ A~, rounding
prepare.py         a layer's small operands: the stored scale, A and B as fixed point
weight.py          W^ in one pass
backward.py        masks, scales and sums of the backward, around the vendor library's products
experts.py         stacks of experts: the same kernels, and grouped products
low_bit_weight.py  W^ of low-bit SR, and the gradient of its scales
low_bit_step.py    the optimizer step on packed codes
arithmetic.py      quotients, roots and random words of that step
second_moment.py   the factored second moment of that step
latent.py          ternary scales that follow their latent weights
inputs.py          inputs rounded per token or group
static_inputs.py   inputs rounded with a fixed scale, and the gradients
cache.py           keys and values rounded by vLLM's rule
launch.py          launching one of them with little Python
"""

from .backward import keeps_output, linear_backward
from .cache import rounded_states
from .experts import (
    expert_linear,
    expert_linear_backward,
    expert_weights,
    expert_weights_backward,
    experts_keep_output,
)
from .inputs import rounded_inputs
from .latent import follow_magnitude, mean_magnitude
from .low_bit_step import low_bit_update
from .low_bit_weight import low_bit_weight, scale_gradient
from .second_moment import update_factors
from .static_inputs import rounded_static, static_gradients
from .weight import linear_weight

__all__ = [
    "expert_linear",
    "expert_linear_backward",
    "expert_weights",
    "expert_weights_backward",
    "experts_keep_output",
    "follow_magnitude",
    "keeps_output",
    "linear_backward",
    "linear_weight",
    "low_bit_update",
    "low_bit_weight",
    "mean_magnitude",
    "rounded_inputs",
    "rounded_states",
    "rounded_static",
    "scale_gradient",
    "static_gradients",
    "update_factors",
]
