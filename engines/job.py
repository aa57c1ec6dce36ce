"""One engine, one folder: what every `in_*.py` script is given and gives back.

    python in_<engine>.py JOB.json ANSWER.json

JOB: {"folder", "dtype", "prompts": [[ids]], "text": [ids], "new_tokens"}.
ANSWER: {"tokens": [[ids]] greedy, "seconds" that took, "nll": mean over text[1:], nats, "versions"}.

The scripts run in the environment of their engine, where peft_lrqat cannot be imported.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

sys.modules.setdefault("peft_lrqat", None)  # type: ignore[arg-type]  # from here on, importing it fails


class Engine(Protocol):
    """What a script's engine can do with token ids."""

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The next `count` tokens, fewer if the model ends."""

    def logits(self, ids: list[int]) -> torch.Tensor:
        """fp32 (len(ids), vocabulary)."""


def answer(open_engine: Callable[[dict[str, Any]], Engine], packages: Sequence[str]) -> None:
    """Run the job that the command line names."""
    job_file, answer_file = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text())
    engine = open_engine(job)
    engine.greedy(job["prompts"][0], 4)  # kernels are built and memory is laid out
    started = time.perf_counter()
    tokens = [engine.greedy(prompt, job["new_tokens"]) for prompt in job["prompts"]]
    seconds = time.perf_counter() - started
    text = torch.tensor(job["text"])
    nll = torch.nn.functional.cross_entropy(engine.logits(job["text"])[:-1].float(), text[1:]).item()
    versions = {package: version(package) for package in packages}
    answer_file.write_text(json.dumps({"tokens": tokens, "seconds": seconds, "nll": nll, "versions": versions}))


class Causal:
    """An engine that gives a transformers model (transformers, gptqmodel)."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @torch.no_grad()
    def greedy(self, ids: list[int], count: int) -> list[int]:
        prompt = torch.tensor([ids])
        mask = torch.ones_like(prompt)
        out = self.model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=count, do_sample=False)
        return out[0, len(ids) :].tolist()

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([ids])).logits[0].float()
