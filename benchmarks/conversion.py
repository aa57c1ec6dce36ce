"""Time of a conversion: choosing the scales of a weight, and all that a layer's conversion does.

    python benchmarks/conversion.py --out benchmarks/results/conversion.json
    python benchmarks/conversion.py --device cuda --rows 11008 --llama 7 --out conversion_cuda.json

Gaussian bf16 weights of 4096 columns. Nanoseconds a weight, the better of two runs, after one that is not counted; on a
CPU those of the process on one thread, whatever else runs, and on a GPU those of the clock. `--llama` also converts
random weights of the shapes of Llama-7B, 13B or 70B, block by block.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import provenance, write_json
from torch import nn

from peft_lrqat.grid import Grid
from peft_lrqat.ranges import choose_range
from peft_lrqat.tuners.common.fingerprint import float_checksum
from peft_lrqat.tuners.common.frozen import FrozenWeight

COLUMNS = 4096
# bits, group size, symmetric, signed
GRIDS = [(bits, group, True, True) for bits in (2, 3, 4, 8) for group in (32, 128, -1)] + [
    (4, 128, True, False),
    (4, 128, False, False),
    (4, -1, False, False),
]
# hidden size, size of keys and values, intermediate size, blocks
LLAMAS = {7: (4096, 4096, 11008, 32), 13: (5120, 5120, 13824, 40), 70: (8192, 1024, 28672, 80)}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    found = []
    for _ in range(3):
        clock = time.process_time if device.type == "cpu" else time.perf_counter
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(clock() - start)
    return min(found[1:])


def layer_of(rows: int, columns: int, device: torch.device) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16, device=device)
    nn.init.normal_(layer.weight, std=0.02)
    return layer.requires_grad_(False)


def convert(layer: nn.Linear, grid: Grid) -> FrozenWeight:
    signed = grid.symmetric
    return FrozenWeight.of_floats(layer, grid, "fx8", signed_scales=signed, source_checksum=0)


def llama(size: int, grid: Grid, device: torch.device) -> dict[str, float]:
    """Seconds for all of a model's blocks, and the peak of the GPU in GiB."""
    hidden, keys, inner, blocks = LLAMAS[size]
    shapes = [(hidden, hidden)] * 2 + [(keys, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)]
    total = 0.0
    for _ in range(blocks):
        layers = [layer_of(*shape, device) for shape in shapes]
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for layer in layers:
            float_checksum(layer.weight)
            convert(layer, grid).checksum()
        if device.type == "cuda":
            torch.cuda.synchronize()
        total += time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return {"billion": size, "seconds": round(total, 2), "peak_gib": round(peak, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--llama", type=int, choices=LLAMAS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layer = layer_of(args.rows, COLUMNS, args.device)
    to_ns = 1e9 / layer.weight.numel()

    def ns(run: Callable[[], object]) -> float:
        return round(seconds(run, args.device) * to_ns, 1)

    found: dict = {**provenance(), "rows": args.rows, "columns": COLUMNS, "range_ns": {}, "whole_ns": {}}
    for bits, group, symmetric, signed in GRIDS:
        grid = Grid(bits, group, symmetric)
        name = grid.describe() + (", signed" if signed else "")
        found["range_ns"][name] = ns(lambda grid=grid, signed=signed: choose_range(layer.weight, grid, signed=signed))
        print(f"{name}: {found['range_ns'][name]} ns a weight", flush=True)
    grid = Grid(4, 128)
    frozen = convert(layer, grid)
    parts = {"fingerprint": lambda: float_checksum(layer.weight), "conversion": lambda: convert(layer, grid)}
    found["whole_ns"] = {name: ns(run) for name, run in {**parts, "checksum": frozen.checksum}.items()}
    print(found["whole_ns"], flush=True)
    if args.llama:
        found["llama"] = llama(args.llama, grid, args.device)
        print(found["llama"])
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    main()
