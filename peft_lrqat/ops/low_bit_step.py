"""The optimizer step of low-bit SR: packed codes in, packed codes out. Its reference is `reference_step.py`."""

from __future__ import annotations

import torch

from . import latent, reference_step
from .dispatch import kernels_for, on_device_of
from .reference_step import FACTORS, Rule, update_factors


@torch.no_grad()
def step_codes(
    packed: torch.Tensor,
    scale: torch.Tensor,
    stream: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, torch.Tensor],
    lr: torch.Tensor,
    rule: Rule,
) -> None:
    """Take one optimizer step on a weight, in place; never waits for the device.

    Args:
        packed, scale, grad, lr: as for `low_bit_update`.
        stream: int64 (2,), key and step of the random numbers. The latter moves on by one.
        state: the tensors of `new_state`, by name. All are updated; "step" counts on by one. Latent weights are added
            to it, or dropped, as the rule says.
    """
    state["step"] += 1
    with on_device_of(packed):
        scale_before = _keep_latent(packed, scale, stream, state, lr, rule)
        operands = dict(state)
        if rule.state == "factored":
            if rule.error_feedback:
                operands |= {f"{name}_before": state[name].clone() for name in FACTORS}
                operands["exp_avg_sq_mean_before"] = state["exp_avg_sq_rows"].mean()
            operands["exp_avg_sq_mean"] = update_factors(state, grad, rule.beta2)
        # the kernel writes in place, to where tensors without gaps have their elements
        kernels = kernels_for(packed) if packed.is_contiguous() and scale.is_contiguous() else None
        implementation = kernels or reference_step
        implementation.low_bit_update(packed, scale, stream, grad, operands, lr, state["step"], rule, scale_before)
    stream[1].add_(1)  # `+= 1` would be copied to where it is


def _keep_latent(
    packed: torch.Tensor,
    scale: torch.Tensor,
    stream: torch.Tensor,
    state: dict[str, torch.Tensor],
    lr: torch.Tensor,
    rule: Rule,
) -> torch.Tensor | None:
    """Begin with latent weights, or end with them; let a ternary scale follow them, and return what it was."""
    if not rule.latent_weights:
        state.pop("latent_codes", None)
        state.pop("latent_start", None)
        return None
    if "latent_codes" not in state:
        state["latent_codes"] = latent.new_latent(packed, stream, rule.columns)
    if not rule.scale_follows:
        return None
    # the kernel writes in place, to where tensors without gaps have their elements
    implementation = (kernels_for(packed) if scale.is_contiguous() else None) or latent
    codes = state["latent_codes"]
    if "latent_start" not in state:  # they may have begun with a rate in grid steps
        means = (implementation.mean_magnitude(packed, k, scale, rule.grid, rule.columns) for k in (codes, None))
        state["latent_start"] = latent.first_magnitude(*means)
    return implementation.follow_magnitude(packed, codes, scale, state["latent_start"], lr, rule.grid)
