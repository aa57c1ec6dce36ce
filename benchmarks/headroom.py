"""What the range does to low-bit SR that starts from a fresh initialization: a small character model, trained once.

    python benchmarks/headroom.py --out benchmarks/results/headroom.json       # a GPU, or a CPU and half an hour

The text is torch's own source (torch/nn/modules/*.py), its last tenth held out. A window of 16 characters, a residual
MLP of 0.4 M weights, 1000 steps of 128 windows, cosine from 1e-3, AdamW (0.9, 0.98); low-bit SR of its three inner
layers with scales per channel and error feedback; these layers begin as nn.Linear's do ("linear", uniform), or with
N(0, 0.02) ("normal"). The figures are the held-out loss, nats, and which share of the codes lies on the two outermost
levels, after the first step and at the end.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from common import provenance, write_json
from peft import get_peft_model
from torch import nn

from peft_lrqat import LowBitAdamW, LowBitSRConfig
from peft_lrqat.tuners.lowbit_sr import LowBitTensor
from peft_lrqat.tuners.lowbit_sr.growth import at_ends

WINDOW = 16
RUNS: list[tuple[float | None, dict[str, Any]]] = [
    (None, {}),
    (8, {"grow_scales": False}),
    (8, {}),
    *((8, {"grow_scales": False, "headroom": factor}) for factor in (2.0, 4.0, 8.0)),
    *((bits, {}) for bits in (4, 3, 2)),
    *((bits, {"range_method": "minmax"}) for bits in (4, 3, 2)),
    *((bits, {"learn_scales": True}) for bits in (4, 3, 2)),
    *((bits, {"headroom": factor}) for bits in (4, 3, 2) for factor in (1.5, 2.0, 3.0, 4.0)),
    *((bits, {"latent_weights": True}) for bits in (4, 3, 2, 1.58)),
    *((bits, {"latent_weights": True, "headroom": factor}) for bits, factor in ((4, 3.0), (3, 2.0), (2, 1.5))),
    (1.58, {}),
    (1.58, {"headroom": 1.5}),
    (1.58, {"learn_scales": True}),
]


class Characters(nn.Module):
    """The next character's logits, from the last `WINDOW`."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, 32)
        self.inward, self.norm = nn.Linear(WINDOW * 32, width), nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, 512), nn.Linear(512, width), nn.Linear(width, count)
        self.last = nn.LayerNorm(width)

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


def measured(bits: float | None, options: dict[str, Any], init: str, args: argparse.Namespace) -> dict[str, Any]:
    """After training; `bits` None: in float."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, count = text()
    data = data.to(device)
    cut = len(data) * 9 // 10
    torch.manual_seed(0)
    model: nn.Module = Characters(count, args.width)
    if init == "normal":
        for layer in (model.inward, model.up, model.down):
            nn.init.normal_(layer.weight, std=0.02)
    if bits:
        targets = ["inward", "up", "down"]
        rest = ["embedding", "norm", "head", "last"]
        config = LowBitSRConfig(
            bits=bits,
            group_size=-1,
            error_feedback=True,
            **{key: value for key, value in options.items() if key != "latent_weights"},
            target_modules=targets,
            modules_to_save=rest,
        )
        model = get_peft_model(model, config)
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    rule = {"lr": args.rate, "betas": (0.9, 0.98), "weight_decay": 0.0}
    if bits:
        optimizer: torch.optim.Optimizer = LowBitAdamW(
            trained, **rule, latent_weights=options.get("latent_weights", False)
        )
    else:
        optimizer = torch.optim.AdamW(trained, **rule)
    order = torch.Generator().manual_seed(1)
    at_first = None

    def loss(first: int, past: int, size: int, generator: torch.Generator) -> torch.Tensor:
        at = torch.randint(first, past - WINDOW - 1, (size,), generator=generator)
        at = at.to(device)
        logits = model(data[at[:, None] + torch.arange(WINDOW, device=device)])
        return nn.functional.cross_entropy(logits, data[at + WINDOW])

    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.rate * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimizer.zero_grad()
        loss(0, cut, 128, order).backward()
        optimizer.step()
        if step == 0:
            at_first = share_at_ends(model)
    with torch.no_grad():
        found = loss(cut, len(data), 8192, torch.Generator().manual_seed(2)).item()
    return {"loss": found, "at_ends": [at_first, share_at_ends(model)]}


def share_at_ends(model: nn.Module) -> float | None:
    """Of all codes, those on the two outermost levels."""
    weights = [p for p in model.parameters() if isinstance(p, LowBitTensor)]
    if not weights:
        return None
    counts = sum(at_ends(w.packed, w.scale, w.grid, w.shape[1]).sum() for w in weights)
    return float(counts) / sum(w.numel() for w in weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--inits", nargs="+", choices=("linear", "normal"), default=["linear", "normal"])
    parser.add_argument("--bits", type=float, nargs="+", help="rows of these bits alone, 0: float")
    args = parser.parse_args()
    runs = []
    for init in args.inits:
        for bits, chosen in RUNS:
            if args.bits and (bits or 0) not in args.bits:
                continue
            found = measured(bits, chosen, init, args)
            name = ", ".join([f"{bits:g} bits" if bits else "float", *(f"{k}={v}" for k, v in chosen.items())])
            ends = " -> ".join(f"{share:.3f}" for share in found["at_ends"]) if bits else ""
            print(f"{init:7} {name:40} {found['loss']:.4f}  {ends}", flush=True)
            runs.append({"init": init, "bits": bits, **chosen, **found})
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        write_json(args.out, {**provenance(), **settings, "runs": runs})


if __name__ == "__main__":
    main()
