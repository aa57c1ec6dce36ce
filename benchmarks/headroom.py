"""What `headroom` does to low-bit SR that starts from a fresh initialization: a small character model, trained once.

    python benchmarks/headroom.py --out benchmarks/results/headroom.json       # a CPU, ten minutes

The text is torch's own source (torch/nn/modules/*.py), its last tenth held out. A window of 16 characters, a residual
MLP of 0.4 M weights, nn.Linear's own initialization, 128 windows a step, cosine from 1e-3, AdamW (0.9, 0.98); low-bit
SR of its three inner layers with scales per channel and error feedback. The figure is the held-out loss, nats.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from common import provenance, write_json
from peft import get_peft_model
from torch import nn

from peft_lrqat import LowBitAdamW, LowBitSRConfig

WINDOW, WIDTH, RATE = 16, 256, 1e-3
RUNS: list[tuple[int | None, float]] = [(None, 1.0), (8, 1.0), (8, 2.0), (8, 4.0), (8, 8.0), (4, 1.0), (4, 1.5)]


class Characters(nn.Module):
    """The next character's logits, from the last `WINDOW`."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, 32)
        self.inward, self.norm = nn.Linear(WINDOW * 32, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down, self.head = nn.Linear(WIDTH, 512), nn.Linear(512, WIDTH), nn.Linear(WIDTH, count)
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inward(self.embedding(x).flatten(1))
        h = h + self.down(nn.functional.gelu(self.up(self.norm(h))))
        return self.head(self.last(h))


def text() -> tuple[torch.Tensor, int]:
    """Character numbers, and how many characters there are."""
    files = sorted((Path(torch.__file__).parent / "nn/modules").glob("*.py"))
    whole = "".join(file.read_text(encoding="utf-8") for file in files)
    numbers = {character: number for number, character in enumerate(sorted(set(whole)))}
    return torch.tensor([numbers[character] for character in whole]), len(numbers)


def held_out_loss(bits: int | None, headroom: float, steps: int) -> float:
    """After training; `bits` None: in float."""
    data, count = text()
    cut = len(data) * 9 // 10
    torch.manual_seed(0)
    model: nn.Module = Characters(count)
    if bits:
        targets = ["inward", "up", "down"]
        rest = ["embedding", "norm", "head", "last"]
        config = LowBitSRConfig(
            bits=bits,
            group_size=-1,
            headroom=headroom,
            error_feedback=True,
            target_modules=targets,
            modules_to_save=rest,
        )
        model = get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    kind = LowBitAdamW if bits else torch.optim.AdamW
    optimizer = kind(trained, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    order = torch.Generator().manual_seed(1)

    def loss(first: int, past: int, size: int, generator: torch.Generator) -> torch.Tensor:
        at = torch.randint(first, past - WINDOW - 1, (size,), generator=generator)
        logits = model(data[at[:, None] + torch.arange(WINDOW)])
        return nn.functional.cross_entropy(logits, data[at + WINDOW])

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss(0, cut, 128, order).backward()
        optimizer.step()
    with torch.no_grad():
        return loss(cut, len(data), 8192, torch.Generator().manual_seed(2)).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    runs = []
    for bits, headroom in RUNS:
        found = held_out_loss(bits, headroom, options.steps)
        print(f"{f'{bits} bits, headroom {headroom:g}' if bits else 'float':24} {found:.4f}", flush=True)
        runs.append({"bits": bits, "headroom": headroom, "loss": found})
    if options.out:
        write_json(options.out, {**provenance(), "steps": options.steps, "runs": runs})


if __name__ == "__main__":
    main()
