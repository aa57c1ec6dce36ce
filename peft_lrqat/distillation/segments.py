"""Sequences in a batch, however it was put together, and a key for what a causal model predicts of each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

# Tensors that a text model is called with; anything else could change what it predicts
_KNOWN = {
    *("input_ids", "attention_mask", "position_ids", "labels", "shift_labels", "num_items_in_batch"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "cache_position"),
}


class Segment(NamedTuple):
    """One sequence of a batch."""

    key: bytes
    """16 bytes: of its token ids, and of which of them are predicted with a label that counts."""
    rows: torch.Tensor
    """int64, on the CPU: the rows of the flattened (batch * tokens) logits that count, ascending."""
    ids: list[int]
    """Its first token ids, for messages."""


def without_padding(inputs: Mapping[str, Any], shift_labels: torch.Tensor) -> torch.Tensor:
    """(batch, tokens) labels, -100 where padding would be what predicts: before the first token, padded on the left."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.shape != shift_labels.shape:
        return shift_labels
    return shift_labels.masked_fill(mask.to(shift_labels.device) == 0, -100)


def segments(inputs: Mapping[str, Any], shift_labels: torch.Tensor) -> Iterator[Segment]:
    """The sequences of a batch that have a label that counts, in the order of the flattened batch.

    Padding is left out, and a row that holds several sequences (packing, padding-free batches) is cut where
    `position_ids` do not go on by one. What a causal model predicts in a sequence depends on its tokens alone, so a
    sequence is found again whatever row, batch, epoch or process it comes in, and on whatever side it is padded. That
    is so because attention does not reach across: transformers keeps the sequences of a row apart where the
    `position_ids` begin anew and no attention mask is given. With a mask it does not: a row is one sequence then, and
    its positions are part of the key. (An attention implementation that reaches across all the same would let a teacher
    see the neighbours that a sequence had when the logits were stored, as it lets the student see those of the day.)

    Args:
        inputs: what the model is called with.
        shift_labels: (batch, tokens), as `without_padding` returns them.

    Raises:
        ValueError: there is more than token ids, masks and positions (images, say), or these have a form from which
            the sequences cannot be read.
    """
    more = sorted(n for n, v in inputs.items() if isinstance(v, torch.Tensor) and n not in _KNOWN)
    if more:
        raise ValueError(
            f"The model is called with {', '.join(more)}. Stored logits are found by token ids, which do not say what "
            "is in there. Give `Distillation` a model."
        )
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError("The model is called without `input_ids`, by which stored logits are found.")
    ids = ids.cpu()
    flags = (shift_labels != -100).cpu()
    mask, positions = (_two_dimensional(inputs, name, ids) for name in ("attention_mask", "position_ids"))
    if positions is None and inputs.get("cu_seq_lens_q") is not None:
        raise ValueError("The batch has `cu_seq_lens_q` and no `position_ids`; its sequences are read from the latter.")
    for row in range(len(ids)):
        real = torch.arange(ids.shape[1]) if mask is None else mask[row].nonzero().squeeze(1)
        breaks: list[int] = []
        if positions is not None:
            breaks = (positions[row, real].diff() != 1).nonzero().add(1).flatten().tolist()
        starts = [0, *(breaks if mask is None else [])]
        for start, stop in zip(starts, [*starts[1:], len(real)], strict=True):
            columns = real[start:stop]
            counted = flags[row, columns]
            if counted.any():
                key = hashlib.blake2b(ids[row, columns].to(torch.int32).numpy().tobytes(), digest_size=16)
                key.update(counted.numpy().tobytes())
                if mask is not None and breaks and positions is not None:
                    key.update(positions[row, real].to(torch.int32).numpy().tobytes())
                rows = columns[counted] + row * ids.shape[1]
                yield Segment(key.digest(), rows, ids[row, columns[:8]].tolist())


def check_positions(model: torch.nn.Module, inputs: Mapping[str, Any]) -> None:
    """Refuse what makes a model's predictions depend on the padding before a sequence: a table of positions.

    Raises:
        ValueError: `model` has one (GPT-2, say), padding is on the left, and `position_ids` do not make up for it.
    """
    mask = inputs.get("attention_mask")
    if inputs.get("position_ids") is not None or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return
    if bool(mask[:, 0].all()) or not any(
        isinstance(module, torch.nn.Embedding) and ("position" in name or name.endswith("wpe"))
        for name, module in model.named_modules()
    ):
        return
    raise ValueError(
        f"{type(model).__name__} numbers the positions of a row, padding included, so what it predicts depends on the "
        "padding before a sequence, and stored logits would not fit. Pad on the right "
        "(`tokenizer.padding_side = 'right'`), or give `Distillation` a model."
    )


def _two_dimensional(inputs: Mapping[str, Any], name: str, ids: torch.Tensor) -> torch.Tensor | None:
    value = inputs.get(name)
    if value is None:
        return None
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or value.shape[1] != ids.shape[1]:
        what = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(
            f"`{name}` is {what}; sequences are read from (batch, tokens) {tuple(ids.shape)}. Give `Distillation` a "
            "model."
        )
    return value.cpu().expand(len(ids), -1)
