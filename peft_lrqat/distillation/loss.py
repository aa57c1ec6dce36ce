"""KL(teacher || student) over the tokens of a causal language model, alone or mixed with its own loss.

Like the lean loss (`tuners/common/loss.py`), the sums are made in fp32 for some tokens at a time, and backward writes
the gradient by its formula, softmax(student) - softmax(teacher). It keeps the logits of both, which exist anyway, and
three numbers a token. Tokens whose label does not count are not looked at.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..arguments import with_suggestions
from ..tuners.common import loss as lean
from ..tuners.common.rules import NUMBER, Rule, check_value, is_positive

_TEMPERATURE = Rule("it must be positive. 1 compares the models' probabilities", is_positive)
_WEIGHT = Rule(
    "it must be from 0 (the model's own loss) to 1 (the teacher's only)",
    lambda value: NUMBER.allows(value) and 0 <= value <= 1,
)


class TopK(NamedTuple):
    """What is known of a teacher's distributions: its k most likely tokens, and what the others have together.

    One row for each token that counts, in the order of the (flattened) labels. A row is normalized before use, so that
    rounding what is stored does no harm.
    """

    indices: torch.Tensor
    """(M, k), integers: which tokens of the vocabulary; no token twice in a row."""
    log_probs: torch.Tensor
    """(M, k + 1), any float dtype: their log-probabilities at the temperature of the loss; last, that of all others."""


class TokenLosses(NamedTuple):
    """fp32 (N,), each 0 where the label does not count."""

    loss: torch.Tensor
    """weight * temperature ** 2 * KL + (1 - weight) * cross-entropy; the only one with a gradient."""
    kl: torch.Tensor
    """KL(teacher || student) in nats, at the temperature of the loss."""


class _Distillation(torch.autograd.Function):
    """`TokenLosses` of the `rows` of (N, V) logits; the teacher is full logits (N, V), or the two parts of `TopK`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        rows: torch.Tensor,
        temperature: float,
        weight: float,
        overwrite: bool,
        *teacher: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss = torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
        kl = torch.zeros_like(loss)
        log_sums = torch.zeros(3, len(rows), dtype=torch.float32, device=logits.device)
        for part in lean.chunks(len(rows), logits.shape[1]):
            picked = rows[part]
            student = logits[picked].float()
            log_sums[0, part] = student.logsumexp(-1)
            ce = log_sums[0, part] - student.gather(1, labels[picked].unsqueeze(1)).squeeze(1)
            compare = _compare_top_k if len(teacher) == 2 else _compare_full
            found = compare(student.div_(temperature), picked, part, log_sums, temperature, *teacher)
            kl[picked] = found
            loss[picked] = weight * temperature**2 * found + (1 - weight) * ce
        ctx.save_for_backward(logits, labels, rows, log_sums, *teacher)
        ctx.options = temperature, weight, overwrite
        ctx.mark_non_differentiable(kl)
        return loss, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _kl: Any) -> tuple[torch.Tensor | None, ...]:
        logits, labels, rows, log_sums, *teacher = ctx.saved_tensors
        temperature, weight, overwrite = ctx.options
        overwrite = overwrite and len(teacher) == 1 and teacher[0].dtype == logits.dtype
        # a second backward finds that a saved tensor was changed, and raises
        result = teacher[0] if overwrite else torch.zeros_like(logits)
        for part in lean.chunks(len(rows), logits.shape[1]):
            picked = rows[part]
            student = logits[picked].float()
            difference = _slope_top_k if len(teacher) == 2 else _slope_full
            slope = difference(student / temperature, picked, part, log_sums, temperature, *teacher)
            slope.mul_(weight * temperature)
            if weight != 1:
                own = student.sub_(log_sums[0, part].unsqueeze(1)).exp_()
                own.scatter_add_(1, labels[picked].unsqueeze(1), own.new_full((len(own), 1), -1.0))
                slope.add_(own, alpha=1 - weight)
            result[picked] = slope.mul_(grad[picked].unsqueeze(1)).to(result.dtype)
        if overwrite and len(rows) < len(result):
            idle = torch.ones(len(result), dtype=torch.bool, device=result.device)
            idle[rows] = False
            result[idle] = 0
        return result, None, None, None, None, None, *(None for _ in teacher)


# The four below see some rows of the student's logits, (n, V) fp32, divided by the temperature already. `rows` are
# those of the logits, `part` those among the tokens that count.


def _compare_full(
    student: torch.Tensor,
    rows: torch.Tensor,
    part: slice,
    log_sums: torch.Tensor,
    temperature: float,
    logits: torch.Tensor,
) -> torch.Tensor:
    teacher = logits[rows].float().div_(temperature)
    log_sums[1, part] = student.logsumexp(-1)
    log_sums[2, part] = teacher.logsumexp(-1)
    teacher -= log_sums[2, part].unsqueeze(1)
    share = teacher.exp()
    # 0 log 0 = 0, also where the student agrees that a token is impossible
    difference = teacher.sub_(student.sub_(log_sums[1, part].unsqueeze(1))).masked_fill_(share == 0, 0.0)
    return share.mul_(difference).sum(-1)


def _slope_full(
    student: torch.Tensor,
    rows: torch.Tensor,
    part: slice,
    log_sums: torch.Tensor,
    temperature: float,
    logits: torch.Tensor,
) -> torch.Tensor:
    teacher = logits[rows].float().div_(temperature).sub_(log_sums[2, part].unsqueeze(1)).exp_()
    return student.sub_(log_sums[1, part].unsqueeze(1)).exp_().sub_(teacher)


def _compare_top_k(
    student: torch.Tensor,
    rows: torch.Tensor,
    part: slice,
    log_sums: torch.Tensor,
    temperature: float,
    indices: torch.Tensor,
    log_probs: torch.Tensor,
) -> torch.Tensor:
    index = indices[part].long()
    teacher = log_probs[part].float().log_softmax(-1)
    log_sums[1, part] = student.logsumexp(-1)
    head = student.gather(1, index)
    log_sums[2, part] = student.scatter_(1, index, -torch.inf).logsumexp(-1)
    found = torch.cat([head, log_sums[2, part].unsqueeze(1)], 1).sub_(log_sums[1, part].unsqueeze(1))
    share = teacher.exp()
    return share.mul_(teacher.sub_(found).masked_fill_(share == 0, 0.0)).sum(-1)


def _slope_top_k(
    student: torch.Tensor,
    rows: torch.Tensor,
    part: slice,
    log_sums: torch.Tensor,
    temperature: float,
    indices: torch.Tensor,
    log_probs: torch.Tensor,
) -> torch.Tensor:
    """softmax(student) minus the teacher's share; the share of "all others" falls to each as the student divides it."""
    index = indices[part].long()
    teacher = log_probs[part].float().softmax(-1)
    rest = teacher[:, -1] / (log_sums[2, part] - log_sums[1, part]).exp()
    rest = torch.where(teacher[:, -1] == 0, 0.0, rest)
    own = student.sub_(log_sums[1, part].unsqueeze(1)).exp_()
    head = own.gather(1, index).sub_(teacher[:, :-1])
    return own.mul_((1 - rest).unsqueeze(1)).scatter_(1, index, head)


def token_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor | TopK,
    temperature: float = 1.0,
    weight: float = 1.0,
    ignore_index: int = -100,
    overwrite: bool = False,
) -> TokenLosses:
    """The losses of single tokens.

    Args:
        logits: (N, V), any float dtype; row i predicts `labels[i]`.
        labels: (N,) int64.
        teacher: logits of the same shape, any float dtype, or `TopK`; no gradient goes there.
        overwrite: whether backward may write the gradient over the teacher's logits, which spares a third tensor of
            this size; there is one backward then.

    The other arguments and the errors are those of `distillation_loss`.
    """
    check_options(temperature, weight)
    rows = (labels != ignore_index).nonzero().squeeze(1)
    if isinstance(teacher, TopK):
        count, k = teacher.indices.shape
        if count != len(rows) or teacher.log_probs.shape != (count, k + 1):
            raise ValueError(
                f"The labels have {len(rows)} tokens that count; `teacher` has indices of shape "
                f"{tuple(teacher.indices.shape)} and log_probs of shape {tuple(teacher.log_probs.shape)}. "
                "They must be (tokens that count, k) and (tokens that count, k + 1)."
            )
        parts = tuple(part.to(logits.device) for part in teacher)
    else:
        if teacher.shape != logits.shape:
            raise ValueError(
                f"The teacher's logits are {tuple(teacher.shape)}, the student's {tuple(logits.shape)}. Both must be "
                "of the same tokens and the same vocabulary."
            )
        parts = (teacher.detach().to(logits.device),)
    return TokenLosses(*_Distillation.apply(logits, labels, rows, temperature, weight, overwrite, *parts))


def check_options(temperature: float, weight: float) -> None:
    """Raise ValueError unless `temperature` and `weight` are in their ranges."""
    check_value("temperature", temperature, _TEMPERATURE)
    check_value("weight", weight, _WEIGHT)


@with_suggestions
def distillation_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor | TopK,
    *,
    temperature: float = 1.0,
    weight: float = 1.0,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the loss of distillation, for a training loop of your own.

    It is `weight * temperature ** 2 * KL(teacher || student) + (1 - weight) * cross-entropy`. Both distributions of the
    KL are taken at the temperature, the cross-entropy at 1. The factor `temperature ** 2` keeps the size of the
    gradient. For a `TopK` teacher, all that is below the k-th token is one event, "something else". The KL is then a
    lower bound of the full one. The student is told how likely the k tokens are altogether, which renormalizing over
    them would not tell.

    Args:
        logits (torch.Tensor): the student's, (..., tokens, vocabulary), any float dtype.
        labels (torch.Tensor): int64 (..., tokens). Token t is predicted from the logits at t - 1. Only tokens with a
            label count.
        teacher (torch.Tensor | TopK): the teacher's logits, of the student's shape; or `TopK`, with a row for each
            token that counts. No gradient goes there.
        temperature (float): above 0.
        weight (float): of the teacher, from 0 to 1.
        num_items_in_batch (torch.Tensor | int | None): what the sum is divided by (the Trainer's count, with gradient
            accumulation). None: the number of tokens that count.
        ignore_index (int): the label that does not count.
        shift_labels (torch.Tensor | None): labels that are shifted already, int64 (..., tokens).

    Returns:
        The loss in nats, an fp32 scalar.

    Raises:
        ValueError: an option is out of range, or shapes do not fit.

    Examples:
        >>> import torch
        >>> from peft_lrqat import distillation_loss
        >>> batch = tokenizer(texts[0][:64], return_tensors="pt")
        >>> with torch.no_grad():
        ...     teacher = base(**batch).logits
        >>> loss = distillation_loss(model(**batch).logits, batch["input_ids"], teacher, temperature=2.0, weight=0.5)
        >>> loss.backward()
    """
    _check_labels(logits, labels, shift_labels)
    targets = lean.shifted(labels, shift_labels, ignore_index).to(logits.device)
    rows = logits.reshape(-1, logits.shape[-1])
    if not isinstance(teacher, (TopK, torch.Tensor)):
        raise ValueError(
            f"`teacher` is a {type(teacher).__name__}; it must be the teacher's logits, a tensor, or `TopK`."
        )
    if not isinstance(teacher, TopK):
        teacher = teacher.reshape(-1, teacher.shape[-1])
    found = token_losses(rows, targets, teacher, temperature, weight, ignore_index)
    return lean.divided(found.loss.sum(), targets, num_items_in_batch, ignore_index)


def _check_labels(logits: torch.Tensor, labels: torch.Tensor, shift_labels: torch.Tensor | None) -> None:
    """Raise ValueError unless the labels that are used are integers, one for each row of the logits."""
    name, used = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    if used.dtype not in (torch.int64, torch.int32) or used.numel() != logits[..., 0].numel():
        raise ValueError(
            f"`{name}` is a tensor of {used.dtype} {tuple(used.shape)}; it must be int64 {tuple(logits.shape[:-1])}, a "
            "label for each token of the logits."
        )


def top_k(logits: torch.Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The `TopK` of logits (N, V), in fp32; k is at most V."""
    scaled = logits.float().div(temperature)
    scaled -= scaled.logsumexp(-1, keepdim=True)
    values, indices = scaled.topk(k, -1)
    rest = scaled.scatter_(1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    return TopK(indices, torch.cat([values, rest], 1))
