"""A float model, fine-tuned to ternary weights with low-bit SR: with latent weights and without.

    python benchmarks/ternary.py --out benchmarks/results/ternary.json       # a GPU, or a CPU and half an hour

The text is torch's own Python source, as bytes, every twentieth file held out. A LLaMA-structured model is trained in
float on one half of the text, then its linear layers are made ternary ("absmean") and everything is trained on the
other half, with a cosine of its own. Each method is one of pretrain.py's, with options after a colon, and `kl=1` for
the loss to the float model's outputs in place of the text's. The figures are held-out losses in nats a byte: `float`,
`start` (ternary, not yet trained) and `loss`. ternary_latent.json has the methods with latent weights since these begin
where the float weights lay; in ternary.json they began anywhere that rounds to the same codes.
"""

from __future__ import annotations

import argparse
import copy
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import provenance, write_json
from pretrain import batches, float_model, held_out_loss, parse_method, prepare
from torch import nn
from training import Step, loss_of, schedule

METHODS = [
    *(f"{name}:lr={rate},float_lr={rate}" for rate in (3e-4, 1e-3, 3e-3) for name in ("ours-1.58", "ours-1.58-latent")),
    "ours-1.58-latent:lr=0.001,float_lr=0.001,group_size=0",
    *(f"{name}:lr=0.001,float_lr=0.001,kl=1" for name in ("ours-1.58", "ours-1.58-latent")),
]


def read_text(length: int) -> dict[str, torch.Tensor]:
    """Windows (n, length) of "first", "second" and "held-out" bytes, uint8."""
    files = sorted(Path(torch.__file__).parent.rglob("*.py"))
    parts: dict[str, list[bytes]] = {"first": [], "second": [], "held-out": []}
    for number, file in enumerate(files):
        parts["held-out" if number % 20 == 0 else ("first", "second")[number % 2]].append(file.read_bytes())
    texts = {name: np.frombuffer(b"".join(part), np.uint8) for name, part in parts.items()}
    whole = {name: text[: len(text) // length * length].reshape(-1, length) for name, text in texts.items()}
    return {name: torch.from_numpy(windows.copy()) for name, windows in whole.items()}


def train(
    model: nn.Module,
    options: dict[str, Any],
    windows: torch.Tensor,
    steps: int,
    seed: int,
    args: argparse.Namespace,
    teacher: nn.Module | None = None,
) -> nn.Module:
    """`steps` steps of AdamW or `LowBitAdamW`; returns the model, adapted where the options say so."""
    model, optimizer, rates = prepare(model, options, windows.device)
    model.train()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    kl = options.get("kl", 0.0)
    fused = bool(options.get("fused_backward"))  # then weights change in backward, which no graph has and no clipping
    step = Step(
        model,
        trained,
        (args.batch, args.length),
        graph=windows.is_cuda and not fused,
        loss=lambda model, rows: loss_of(model, rows, teacher=teacher, kl=kl),
    )
    for number, rows in enumerate(batches(windows, steps, args.batch, seed)):
        for tensor, peak in rates:
            tensor.fill_(peak * schedule(number, steps))
        step(rows)
        if not fused:
            nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return model


def measured(seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All methods from one float model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = {name: windows.to(device) for name, windows in read_text(args.length).items()}
    chosen = torch.randperm(len(text["held-out"]), generator=torch.Generator().manual_seed(0))[: args.held_out]

    def loss(model: nn.Module) -> float:
        return held_out_loss(model, text["held-out"][chosen], 64).item()

    options = parse_method(f"float:lr={args.float_rate},float_lr={args.float_rate}")
    floating = train(float_model(args, "normal", seed, device), options, text["first"], args.float_steps, seed, args)
    floating.requires_grad_(False)
    floating.name_or_path = "trained in float"  # by which a model that was trained is known
    before, runs = loss(floating), []
    for method in args.methods:
        options = parse_method(method)
        start = loss(prepare(copy.deepcopy(floating), options, device)[0])
        model = train(copy.deepcopy(floating), options, text["second"], args.steps, seed, args, floating)
        runs.append({"method": method, "seed": seed, "float": before, "start": start, "loss": loss(model)})
        print(runs[-1], flush=True)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=METHODS)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="each in a process of its own")
    for name, value in {"float_steps": 1500, "steps": 300, "batch": 16, "length": 128, "held_out": 512}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    for name, value in {"hidden": 128, "intermediate": 352, "layers": 3, "head_dim": 32}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--float-rate", type=float, default=3e-3)
    args = parser.parse_args()
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "seeds", "methods")}
    args.shape, args.vocabulary = None, 256
    with get_context("spawn").Pool(len(args.seeds)) as pool:
        found = pool.starmap(measured, [(seed, args) for seed in args.seeds])
    write_json(args.out, {**provenance(), **settings, "runs": [run for runs in found for run in runs]})


if __name__ == "__main__":
    main()
