"""What TRL's SFTTrainer reads of a forward with `fused_lm_head=True`, made from the losses of single tokens.

That forward never builds the logits: it returns each label's log-probability, from which the trainer makes the loss. A
teacher needs the logits, so the model's own forward runs, and minus the loss of a token takes its log-probability's
place: the trainer's sum, its division, and the scaling for several processes stay what they are.
"""

from __future__ import annotations

from typing import Any

import torch

from ..tuners.common import loss as lean
from .loss import TokenLosses


def fused_output(output: Any, losses: TokenLosses, targets: torch.Tensor) -> Any:
    """TRL's `FusedCausalLMOutput`, whose log-probability of a token is minus its loss.

    Args:
        output: of the model's own forward.
        losses: (batch * tokens,) each.
        targets: (batch * tokens,), what is predicted; -100 where it does not count.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    logits = output.logits.detach()
    shape = logits.shape[:-1]
    targets = targets.to(logits.device)
    entropy, is_top1 = _metrics(logits.flatten(0, -2), targets)
    return FusedCausalLMOutput(
        loss=output.loss,
        log_probs=-losses.loss.view(shape),
        entropy=entropy.view(shape),
        is_top1=is_top1.view(shape),
        label_mask=(targets != -100).view(shape),
        aux_loss=getattr(output, "aux_loss", None),
    )


@torch.no_grad()
def _metrics(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy in nats and whether the label is the likeliest token, of (N, V) logits; 0 where no label counts."""
    entropy = torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
    is_top1 = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    rows = (targets != -100).nonzero().squeeze(1)
    for part in lean.chunks(len(rows), logits.shape[1]):
        picked = rows[part]
        log_probs = logits[picked].float().log_softmax(-1)
        is_top1[picked] = log_probs.argmax(-1) == targets[picked]
        entropy[picked] = torch.special.entr(log_probs.exp_()).sum(-1)
    return entropy, is_top1
