"""What the step of low-bit SR takes on a GPU, kernel by kernel, for the weights of Llama 2 7B.

    python benchmarks/step_kernels.py --out benchmarks/results/step_kernels.json     # a GPU, about a minute
    python benchmarks/step_kernels.py --sweep                                        # the update's tiles, each of them
    python benchmarks/step_kernels.py --smoke                                          # a CPU, tiny: does it run

For every kind of state and every shape: milliseconds of each kernel (torch.profiler, the mean of `--times` steps) and
of all of them, what that is for all 224 weights, and the gigabytes per second of what the step has to read and write
once. Gradients are bf16. `digest` is one of everything that a few steps changed, so that two commits can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import LLAMA, provenance, write_json

from peft_lrqat.grid import Grid
from peft_lrqat.ops import kernels, reference_step, use_kernels
from peft_lrqat.ops.low_bit_step import Scalars, step_codes
from peft_lrqat.ops.reference_step import Rule, new_state
from peft_lrqat.tuners.lowbit_sr import LowBitTensor

#: Bits, group size and options of `Rule`, by name.
KINDS: dict[str, tuple[float, int, dict[str, Any]]] = {
    "int4, factored": (4, -1, {"state": "factored"}),
    "int4, 8-bit state": (4, -1, {"state": "8bit"}),
    "int4, groups of 128, factored": (4, 128, {"state": "factored"}),
    "int3, factored": (3, -1, {"state": "factored"}),
    "int8, factored": (8, -1, {"state": "factored"}),
    "ternary, latent, factored": (1.58, -1, {"state": "factored", "latent_weights": True}),
    "ternary, latent, 8-bit state": (1.58, -1, {"state": "8bit", "latent_weights": True}),
}


def shapes() -> dict[tuple[int, int], int]:
    """Shapes of the linear layers of a 7B model, and how many there are of each."""
    width, inner, layers = (LLAMA["7B"][key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    return {(width, width): 4 * layers, (inner, width): 2 * layers, (width, inner): layers}


class Weight:
    """A weight, a gradient and a state, and steps of it."""

    def __init__(self, kind: str, shape: tuple[int, int], device: str) -> None:
        bits, group_size, options = KINDS[kind]
        grid = Grid(bits, group_size)
        torch.manual_seed(0)
        with torch.device(device):
            codes = torch.randint(grid.qmin, grid.qmax + 1, shape, dtype=torch.int8)
            scale = torch.rand(grid.scale_shape(*shape)) * 0.02 + 0.01
            self.weight = LowBitTensor.from_codes(codes, scale, grid, 12345)
            self.grads = [(torch.randn(shape) * torch.rand(1, shape[1])).bfloat16() for _ in range(2)]
        common = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.0}
        self.rule = Rule(grid, shape[1], **common, error_feedback=True, lr_unit="weight", **options)
        self.state = new_state(torch.Size(shape), self.rule.state, self.rule.momentum, torch.device(device))
        self.scalars, self.lr = Scalars(), torch.full((), 1e-3, device=device)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Everything that a step changes."""
        yield from (self.weight.packed, self.weight.scale)
        yield from (self.state[name] for name in sorted(self.state) if name not in ("step", "latent_start"))

    def step(self, number: int) -> None:
        """Make step `number`, from 1."""
        corrections = self.scalars.corrections(self.rule, number, self.lr.device)
        inner = self.weight.packed, self.weight.scale, self.weight.stream
        step_codes(*inner, self.grads[number % 2], self.state, self.lr, self.rule, corrections)

    def digest(self) -> str:
        """A hash of everything that steps changed."""
        found = hashlib.sha256()
        for tensor in self.tensors():
            found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]

    def bytes(self) -> int:
        """What a step reads and writes, each tensor once either way."""
        return self.grads[0].nbytes + 2 * sum(tensor.nbytes for tensor in self.tensors())


def kernel_ms(weight: Weight, times: int) -> dict[str, float]:
    """Milliseconds of each kernel of a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        for number in range(times):
            weight.step(4 + number)
        torch.cuda.synchronize()
    found = {event.key: event.self_device_time_total / 1000 / times for event in record.key_averages()}
    return {name: found[name] for name in sorted(found, key=lambda name: -found[name]) if found[name] > 0}


def measured(kind: str, sizes: dict[tuple[int, int], int], device: str, times: int) -> dict[str, Any]:
    """One kind of state, all shapes."""
    rows, whole = [], 0.0
    for shape, count in sizes.items():
        weight = Weight(kind, shape, device)
        for number in range(1, 4):
            weight.step(number)
        row: dict[str, Any] = {"shape": list(shape), "digest": weight.digest()}
        if device == "cuda":
            each = kernel_ms(weight, times)
            taken = sum(each.values())
            whole += taken * count
            row |= {"ms": taken, "GB_per_s": weight.bytes() / taken / 1e6}
            row["update_ms"] = each.get("_update_kernel", 0.0)
            row["kernels"] = {name[:60]: ms for name, ms in each.items() if ms > 0.002 * taken}
        rows.append(row)
    return {"kind": kind, "model_ms": whole, "shapes": rows}


def sweep(kinds: list[str], sizes: dict[tuple[int, int], int], device: str, times: int) -> list[dict[str, Any]]:
    """The update kernel with each tile: milliseconds of all weights. Digests must not depend on the tile."""
    from peft_lrqat.ops.kernels import low_bit_step

    found, usual = [], low_bit_step.TILE
    for kind in kinds:
        for height, warps in ((8, 4), (4, 4), (4, 2), (2, 1), (16, 8)):
            for blocks in (1, 4, 16):
                low_bit_step.TILE = low_bit_step.Tile(height, blocks, warps)
                low_bit_step._launch.cache_clear()
                row = measured(kind, sizes, device, times)
                ms = sum(
                    shape.get("update_ms", 0.0) * count
                    for shape, count in zip(row["shapes"], sizes.values(), strict=True)
                )
                digests = [shape["digest"] for shape in row["shapes"]]
                found.append({"kind": kind, **low_bit_step.TILE._asdict(), "update_ms": ms, "digests": digests})
                print(json.dumps(found[-1]), flush=True)
    low_bit_step.TILE = usual
    low_bit_step._launch.cache_clear()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--sweep", action="store_true", help="the update's tiles instead, as lines of JSON")
    parser.add_argument("--torch-norms", action="store_true", help="as the reference has them, to compare digests")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on whatever there is")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {(16, 512): 1} if args.smoke else shapes()
    if device == "cpu" and not args.smoke:
        parser.error("without a GPU there is only --smoke")
    if args.torch_norms:
        kernels.update_factors = reference_step.update_factors
    with use_kernels(device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        if args.sweep:
            rows = sweep(args.only, sizes, device, args.times)
        else:
            rows = [measured(kind, sizes, device, args.times) for kind in args.only]
            for row in rows:
                print(f"{row['kind']:32} {row['model_ms']:8.1f} ms a model", flush=True)
                for shape in row["shapes"]:
                    print("   ", json.dumps(shape), flush=True)
    if args.out:
        write_json(args.out, {**provenance(), "times": args.times, "rows": rows})


if __name__ == "__main__":
    main()
