"""The language-model loss without fp32 copies of the logits.

transformers computes it in fp32: it copies the logits, log_softmax makes another copy and keeps it for backward, and
the gradient is a third one before it is rounded to the logits' dtype. With a vocabulary of 32,000 and 4096 tokens that
is 1.5 GiB, which for a packed 7B model is the peak of the whole step. Here the same sums are made in fp32 for some rows
at a time; backward needs the logits themselves, which the model returns anyway, and one number per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# Logits that are in fp32 at a time
CHUNK = 1 << 23


class _CrossEntropy(torch.autograd.Function):
    """Sum over tokens of -log softmax(logits)[label]; (N, V) any float dtype, (N,) int64."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
        log_sums = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        picked = torch.empty_like(log_sums)
        safe = labels.clamp(min=0)
        for rows in chunks(*logits.shape):
            part = logits[rows].float()
            log_sums[rows] = part.logsumexp(-1)
            picked[rows] = part.gather(1, safe[rows].unsqueeze(1)).squeeze(1)
        ctx.save_for_backward(logits, labels, log_sums)
        ctx.ignore_index = ignore_index
        return (log_sums - picked).masked_fill(labels == ignore_index, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, labels, log_sums = ctx.saved_tensors
        result = torch.empty_like(logits)
        counted = (labels != ctx.ignore_index).unsqueeze(1)
        safe = labels.clamp(min=0).unsqueeze(1)
        for rows in chunks(*logits.shape):
            part = (logits[rows].float() - log_sums[rows].unsqueeze(1)).exp_()
            part.scatter_add_(1, safe[rows], part.new_full((part.shape[0], 1), -1.0))
            result[rows] = part.mul_(grad * counted[rows])
        return result, None, None


def chunks(rows: int, vocabulary: int) -> list[slice]:
    """Cover the rows of (rows, vocabulary) logits with slices that are in fp32 one at a time."""
    step = max(1, CHUNK // max(1, vocabulary))
    return [slice(start, start + step) for start in range(0, rows, step)]


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """What transformers' `ForCausalLMLoss` computes, up to the order of summation.

    Args:
        logits: (..., tokens, V), any float dtype.
        labels: (..., tokens) int64; token t is predicted from the logits at t - 1.
        vocab_size: V.
        num_items_in_batch: what the sum is divided by (the Trainer's, with gradient accumulation); None: the mean.
        ignore_index: the label that does not count.
        shift_labels: labels that are shifted already.

    Returns:
        fp32 scalar. Further keyword arguments are not looked at, as in transformers.
    """
    targets = shifted(labels, shift_labels, ignore_index).to(logits.device)
    total = _CrossEntropy.apply(logits.reshape(-1, vocab_size), targets, ignore_index)
    return divided(total, targets, num_items_in_batch, ignore_index)


def shifted(labels: torch.Tensor, shift_labels: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """The labels of `causal_lm_loss` as (N,): one for each row of the flattened logits."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.reshape(-1)


def divided(
    total: torch.Tensor, targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None, ignore_index: int
) -> torch.Tensor:
    """A sum over tokens as `causal_lm_loss` returns it: by what the Trainer counts, or by the tokens that count."""
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def use_lean_loss(model: Any) -> None:
    """Give a causal language model of transformers `causal_lm_loss`, if its loss is transformers' own."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if getattr(model, "loss_function", None) is ForCausalLMLoss:
        model.loss_function = causal_lm_loss


def restore_loss(model: Any) -> None:
    """Undo `use_lean_loss`."""
    if model.__dict__.get("_loss_function") is causal_lm_loss:
        del model._loss_function
