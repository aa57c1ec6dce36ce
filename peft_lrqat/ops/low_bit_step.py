"""The optimizer step of low-bit SR: packed codes in, packed codes out. Its reference is `reference_step.py`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from . import latent, reference_step
from .dispatch import kernels_for, on_device_of
from .reference_step import Corrections, Rule, corrections_of, settle_momentum


class Scalars:
    """Scalars on the device that all weights have in common which are at the same step.

    A launch fills one, and several compute the corrections, which is more than the step of a weight takes otherwise.
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, Any] = {}

    def rate(self, lr: float | torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the learning rate as `step_codes` takes it."""
        if isinstance(lr, torch.Tensor):
            return lr.to(device, torch.float32)
        # filled there: a copy would wait for the device
        return self._get(device, lr, lambda: torch.full((), lr, dtype=torch.float32, device=device))

    def corrections(self, rule: Rule, step: float, device: torch.device) -> Corrections:
        """Return the corrections of a step, whose number counts from 1."""
        key = (rule.beta1, rule.beta2, step)
        return self._get(device, key, lambda: corrections_of(rule, step, device))

    def _get(self, device: torch.device, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` made, now or a short time ago, on the device's current stream: another would not wait."""
        stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else None
        place = (device, stream, key)
        # looked up once: updates in backward run in a thread for each device, and another one may begin anew meanwhile
        found = self._held.get(place)
        if found is None:
            if stream is not None and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "The step of low-bit weights cannot be captured in a CUDA graph: its number, and with it the "
                    "correction of the moments, would be the same in every replay. Capture forward and backward only, "
                    "with `fused_backward=False`, or have `peft_lrqat.cuda_graphs(model)` capture the blocks."
                )
            if len(self._held) >= 16:  # those of earlier steps
                self._held.clear()
            found = self._held[place] = make()
        return found


def step_codes(
    packed: torch.Tensor,
    scale: torch.Tensor,
    stream: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, torch.Tensor],
    lr: torch.Tensor,
    rule: Rule,
    corrections: Corrections | None = None,
    norms: bool = False,
) -> torch.Tensor | None:
    """Take one optimizer step on a weight, in place; never waits for the device.

    Args:
        packed, scale, stream, grad, lr, norms: as for `low_bit_update`.
        state: the tensors of `new_state`, by name. All are updated, or replaced; "step" counts on by one. Latent
            weights are added to it, or dropped, as the rule says.
        corrections: of this step, where they are known: they are the same for all weights that have made as many.

    Returns:
        As `low_bit_update`.
    """
    with on_device_of(packed):
        settle_momentum(state, rule)
        state["step"] += 1
        if corrections is None:
            corrections = corrections_of(rule, float(state["step"]), packed.device)
        scale_before = _keep_latent(packed, scale, stream, state, lr, rule)
        # the kernels write in place, to where tensors without gaps have their elements
        kernels = kernels_for(packed) if packed.is_contiguous() and scale.is_contiguous() else None
        implementation = kernels or reference_step
        of_rows = implementation.update_factors(state, grad, rule.beta2) if rule.state == "factored" else None
        operands = (packed, scale, stream, grad, state, lr, corrections, rule, scale_before)
        found = implementation.low_bit_update(*operands, norms and of_rows is None)
    return of_rows if norms and of_rows is not None else found


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
