"""A language of 29 words, and a float model that learns it on one core in seconds: the start of the notebook.

    Ann has three apples . Bob gives Ann two apples . Now Ann has five apples .

A model that was rounded badly mixes up names, things and sums, which anybody sees.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations, product

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

NAMES = ("Ann", "Bob", "Eve", "Ian", "Joe", "Kim", "Leo", "Mia")
THINGS = ("apples", "books", "cups", "dates", "eggs", "figs")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
WORDS = ("has", "gives", "Now", ".")
SPECIAL = ("<pad>", "<s>", "</s>")
#: So many words at the end of a story follow from the others.
ENDING = 5
#: Every so many stories, one is held out.
HELD_OUT_EVERY = 8


def stories() -> tuple[Dataset, Dataset]:
    """(training, held-out) stories, column "text": all that there are, in an order that is always the same."""
    every = [
        f"{one} has {NUMBERS[a]} {thing} . {other} gives {one} {NUMBERS[b]} {thing} . "
        f"Now {one} has {NUMBERS[a + b + 2]} {thing} ."
        for (one, other), thing, a, b in product(permutations(NAMES, 2), THINGS, range(5), range(5))
    ]
    random.Random(0).shuffle(every)
    training = [story for i, story in enumerate(every) if i % HELD_OUT_EVERY]
    return Dataset.from_dict({"text": training}), Dataset.from_dict({"text": every[::HELD_OUT_EVERY]})


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word."""
    words = {word: i for i, word in enumerate((*SPECIAL, *NAMES, *THINGS, *NUMBERS, *WORDS))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def small_model(training: Dataset, tokenizer: PreTrainedTokenizerBase, steps: int = 400) -> PreTrainedModel:
    """A float model of 23,000 weights that knows the language."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    ids = _ids(training["text"], tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    for _ in range(steps):
        batch = ids[torch.randint(len(ids), (64,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def right_endings(model: torch.nn.Module, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> float:
    """The share of stories whose last sentence the model knows word for word, from 0 to 1."""
    ids = _ids(texts, tokenizer)[:, :-1].to(model.device)
    found = model(input_ids=ids).logits[:, -ENDING - 1 : -1].argmax(-1)
    return (found == ids[:, -ENDING:]).all(1).float().mean().item()


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    return tokenizer([text + tokenizer.eos_token for text in texts], return_tensors="pt")["input_ids"]
