"""What accuracy.py measures of a model: perplexity, KL to the float model, greedy agreement, HellaSwag."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from training import causal_model, hidden_of, kl_to, windows


@torch.no_grad()
def against_float(
    model: nn.Module, teacher: nn.Module, rows: np.ndarray, device: torch.device, size: int = 8, chunk: int = 2048
) -> dict[str, float]:
    """Of next-token predictions on `rows` (number, seq), under bf16 autocast.

    Returns:
        ppl: perplexity; kl: mean KL(float || model), nats a token; agree: share of tokens where both predict the same.
    """
    head, float_head = causal_model(model).lm_head, causal_model(teacher).lm_head
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in torch.from_numpy(rows).split(size):
        batch = batch.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            hidden, taught, labels = hidden_of(model, batch), hidden_of(teacher, batch), batch[:, 1:].flatten()
            for h, t, wanted in zip(hidden.split(chunk), taught.split(chunk), labels.split(chunk), strict=True):
                logits, target = head(h).float(), float_head(t).float()
                sums[0] += nn.functional.cross_entropy(logits, wanted, reduction="sum")
                sums[1] += kl_to(target, logits)
                sums[2] += (logits.argmax(-1) == target.argmax(-1)).sum()
    nll, kl, agree = (sums / (rows.shape[0] * (rows.shape[1] - 1))).tolist()
    return {"ppl": math.exp(min(nll, 700.0)), "kl": kl, "agree": agree}


@torch.no_grad()
def hellaswag(
    model: nn.Module, items: list[dict[str, Any]], device: torch.device, tokens: int = 16384
) -> dict[str, Any]:
    """Share of items whose right ending is the likeliest a byte, with its standard error.

    Args:
        items: each `context` (token ids), `endings` (4 lists of token ids), `bytes` (4 lengths), `label`.
        tokens: about so many a batch.
    """
    rows = [
        (number, i, [*item["context"], *ending], len(ending))
        for number, item in enumerate(items)
        for i, ending in enumerate(item["endings"])
    ]
    rows.sort(key=lambda row: len(row[2]), reverse=True)
    places: list[tuple[int, int]] = []
    losses: list[torch.Tensor] = []
    causal = causal_model(model)
    while rows:
        length = len(rows[0][2])
        batch, rows = rows[: max(1, tokens // length)], rows[max(1, tokens // length) :]
        ids = torch.zeros(len(batch), length, dtype=torch.int64)
        for line, row in zip(ids, batch, strict=True):
            line[: len(row[2])] = torch.tensor(row[2])  # padded behind: a causal model does not see it
        ids = ids.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state
            for line, h, (number, i, row, ending) in zip(ids, hidden, batch, strict=True):
                logits = causal.lm_head(h[len(row) - ending - 1 : len(row) - 1]).float()
                wanted = line[len(row) - ending : len(row)]
                losses.append(nn.functional.cross_entropy(logits, wanted, reduction="sum"))
                places.append((number, i))
    scores = np.zeros((len(items), 4))
    scores[tuple(np.transpose(places))] = -torch.stack(losses).cpu().numpy()
    scores /= np.asarray([item["bytes"] for item in items])
    right = scores.argmax(1) == np.asarray([item["label"] for item in items])
    share = float(right.mean())
    return {"accuracy": share, "stderr": math.sqrt(share * (1 - share) / len(items)), "items": len(items)}


def eval_rows(tokens: dict[str, np.ndarray], seq: int, bos: int | None, most: int) -> dict[str, np.ndarray]:
    """The windows of each held-out text, `most` of each."""
    return {name: windows(tokens[name], seq, bos)[:most] for name in ("tune", "report", "wikitext2")}
