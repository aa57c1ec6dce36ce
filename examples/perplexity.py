"""Perplexity of a causal language model. It imports torch only, so that a process without the plugin can use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F


def windows(documents: Iterable[list[int]], separator: int, length: int, total: int) -> torch.Tensor:
    """Documents (token ids), joined by `separator` and cut into windows.

    Returns:
        int64 (n, length), n * length <= total: the windows are taken evenly from the whole text.

    Raises:
        ValueError: the text is shorter than one window.
    """
    stream = [token for document in documents for token in (*document, separator)]
    count = len(stream) // length
    if not count:
        raise ValueError(f"The held-out text has {len(stream)} tokens, less than one window of {length} (--seq-len).")
    wanted = max(1, min(count, total // length))
    every = torch.tensor(stream[: count * length]).view(count, length)
    return every[torch.arange(wanted) * count // wanted]


@torch.no_grad()
def perplexity(
    model: torch.nn.Module, tokens: torch.Tensor, progress: Callable[[Iterable], Iterator] = iter, batch_size: int = 4
) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window.

    Args:
        tokens: int64 (n, length).
        progress: wraps the iteration over batches.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in progress(tokens.split(batch_size)):
        batch = batch.to(model.device)
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1), reduction="none")
        total += loss.double().sum().item()
        count += loss.numel()
    model.train(was_training)
    return math.exp(total / count)
