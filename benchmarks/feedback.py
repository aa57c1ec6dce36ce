"""What error feedback does to low-bit SR on a quadratic with gradient noise, by the size of an update and the noise.

    python benchmarks/feedback.py --out benchmarks/results/feedback.json       # a CPU, three minutes

512 weights of 4 bits, w* uniform in -3 to 3 grid steps, gradient w - w* plus normal noise, LowBitAdamW with its default
betas and fp32 state. The figure is the rms distance from w* in grid steps: of the second half of the steps at a
constant learning rate, and of the last step of a cosine.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from common import provenance, write_json
from torch import nn

from peft_lrqat import Grid, LowBitAdamW
from peft_lrqat.tuners.lowbit_sr import LowBitTensor

NOISES = (0.1, 0.3, 1.0, 3.0)  # standard deviations, grid steps
RATES = (0.003, 0.01, 0.03)  # grid steps an update
COSINE = 0.1


def distance(rate: float, noise: float, feedback: bool, steps: int, cosine: bool = False) -> float:
    """The rms distance from the minimum, grid steps."""
    torch.manual_seed(0)
    shape = (16, 32)
    target = torch.rand(shape) * 6 - 3
    start = (torch.randn(shape) * 2).round().clamp(-8, 7).to(torch.int8)
    weight = nn.Parameter(LowBitTensor.from_codes(start, torch.ones(shape[0], 1), Grid(4, -1), key=1))
    optimizer = LowBitAdamW([weight], lr=rate, error_feedback=feedback, state="fp32")
    squares = []
    for step in range(steps):
        if cosine:
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        weight.grad = weight.detach().float() - target + noise * torch.randn(shape)
        optimizer.step()
        squares.append((weight.detach().float() - target).square().mean())
    kept = squares[-1:] if cosine else squares[steps // 2 :]
    return torch.stack(kept).mean().sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    runs = []
    for noise in NOISES:
        for rate in (*RATES, COSINE):
            cosine = rate == COSINE
            steps = 2000 if cosine else int(min(4000, max(1500, 12 / rate)))
            without, with_ = (distance(rate, noise, feedback, steps, cosine) for feedback in (False, True))
            name = f"cosine from {rate:g}" if cosine else f"{rate:g}"
            print(f"noise {noise:<4g} update {name:16} without {without:.3f}, with {with_:.3f}", flush=True)
            runs.append({"noise": noise, "update": name, "steps": steps, "without": without, "with": with_})
    if options.out:
        write_json(options.out, {**provenance(), "runs": runs})


if __name__ == "__main__":
    main()
