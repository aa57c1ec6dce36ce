"""What the training benchmarks share: batches, the loss, and a step that is replayed as a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

SEQ = 1024  # tokens a window


def windows(tokens: np.ndarray, seq: int = SEQ, bos: int | None = None) -> np.ndarray:
    """(number, seq) int64: the text cut into windows without overlap; each begins with `bos` where a model has one."""
    body = seq if bos is None else seq - 1
    rows = tokens[: len(tokens) // body * body].astype(np.int64).reshape(-1, body)
    return rows if bos is None else np.pad(rows, ((0, 0), (1, 0)), constant_values=bos)


def batches(
    tokens: np.ndarray, steps: int, size: int, seed: int, seq: int = SEQ, bos: int | None = None
) -> Iterator[torch.Tensor]:
    """`steps` batches (size, seq) of those windows, in an order that depends on the seed only."""
    rows = windows(tokens, seq, bos)
    order: list[int] = []
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        while len(order) < size:
            order += generator.permutation(len(rows)).tolist()
        chosen, order = order[:size], order[size:]
        yield torch.from_numpy(rows[chosen])


def targets(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name in it, layer) of the linear layers that every method trains: those of the blocks."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name and "lora_" not in name:
            yield model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module


def causal_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """What the head gets, (tokens, width), for all positions but the last of each row."""
    return causal_model(model).model(input_ids=rows, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)


def kl_to(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Sum over positions of KL(teacher || student): logits (tokens, vocabulary), fp32."""
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum()


def loss_of(
    model: nn.Module,
    rows: torch.Tensor,
    chunk: int = 2048,
    teacher: nn.Module | None = None,
    kl: float = 0.0,
    temperature: float = 1.0,
) -> torch.Tensor:
    """(1 - kl) * next-token loss + kl * T^2 * KL to the teacher, means over tokens, under bf16 autocast.

    The logits exist for `chunk` tokens at a time.
    """
    causal = causal_model(model)
    with torch.autocast(rows.device.type, dtype=torch.bfloat16):
        hidden, labels = hidden_of(model, rows), rows[:, 1:].flatten()
        with torch.no_grad():
            taught = hidden_of(teacher, rows) if teacher is not None and kl else hidden[:, :0].detach()

        def part(h: torch.Tensor, t: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            logits = causal.lm_head(h).float()
            loss = logits.new_zeros(())
            if kl < 1:
                loss = loss + (1 - kl) * nn.functional.cross_entropy(logits, wanted, reduction="sum")
            if kl:
                with torch.no_grad():
                    wanted_logits = teacher.lm_head(t).float() / temperature  # type: ignore[union-attr]
                loss = loss + kl * temperature**2 * kl_to(wanted_logits, logits / temperature)
            return loss

        sums = [
            torch.utils.checkpoint.checkpoint(part, h, t, wanted, use_reentrant=False)
            for h, t, wanted in zip(hidden.split(chunk), taught.split(chunk), labels.split(chunk), strict=True)
        ]
    return sum(sums) / labels.numel()  # type: ignore[return-value]


class Step:
    """Forward and backward of one batch, in `parts` that add up; on a GPU replayed as a CUDA graph, since small models
    wait for Python."""

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        shape: tuple[int, int],
        graph: bool,
        parts: int = 1,
        loss: Callable[[nn.Module, torch.Tensor], torch.Tensor] = loss_of,
    ) -> None:
        self.model, self.parameters, self.parts, self.graph, self.loss_of = model, parameters, parts, None, loss
        if graph:
            self.rows = torch.zeros(shape, dtype=torch.int64, device="cuda")
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())  # `rows` are zeros only then
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._run(self.rows)
            torch.cuda.current_stream().wait_stream(stream)
            self._forget()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = self._run(self.rows)

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _run(self, rows: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=rows.device)
        for part in rows.chunk(self.parts):
            loss = self.loss_of(self.model, part) / self.parts
            loss.backward()
            total += loss.detach()
        return total

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if self.graph is None:
            self._forget()
            return self._run(rows.to(self.parameters[0].device))
        self.rows.copy_(rows)
        self.graph.replay()  # writes the gradients anew
        return self.loss.clone()


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over a tenth, then a cosine to 0."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
