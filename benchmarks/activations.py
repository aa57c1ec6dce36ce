"""What rounding activations, and the KV cache, costs: a training step of LR-QAT, the kernel alone, int8 products.

    python benchmarks/activations.py --out benchmarks/results/activations.json     # a GPU, about a minute
    python benchmarks/activations.py --smoke --out /tmp/activations.json           # a CPU, tiny: does it run

Some blocks of Llama 2 7B with random weights, 4-bit LR-QAT of rank 32 on every linear layer but the head, bf16, block
checkpointing, AdamW, 4 x 1024 random tokens. Steps of the ways alternate, so that a clock that changes hits all of them
alike; medians of `--steps`. The kernel is compared with its reference on the device first, number by number.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import LLAMA, provenance, write_json
from gpu import adapted

from peft_lrqat.ops.dispatch import kernels_for
from peft_lrqat.ops.reference_inputs import ACTIVATION_RULES, rounded_inputs

#: Name -> LRQATConfig options.
WAYS: dict[str, dict[str, Any]] = {
    "float activations": {},
    "8 bits per token": {"act_bits": 8},
    "4 bits per token": {"act_bits": 4},
    "8 bits, groups of 128": {"act_bits": 8, "act_group_size": 128},
    "8 bits per token, vLLM's rule": {"act_bits": 8, "act_rule": "vllm"},
    "8-bit KV cache": {"kv_bits": 8},
    "8-bit KV cache, vLLM's rule": {"kv_bits": 8, "kv_rule": "vllm"},
    "4-bit KV cache, vLLM's rule": {"kv_bits": 4, "kv_rule": "vllm"},
}
#: Input widths of a block's layers, and how many layers have it.
WIDTHS = {LLAMA["7B"]["hidden_size"]: 6, LLAMA["7B"]["intermediate_size"]: 1}


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def steps(args: argparse.Namespace, device: str) -> dict[str, float]:
    """Median seconds of a training step, by way."""
    size = "tiny" if args.smoke else "7B"
    batch, length = (2, 16) if args.smoke else (4, 1024)
    rows = torch.randint(0, 32000, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)
    setting = SimpleNamespace(
        size=size, layers=args.layers, graph=False, from_cpu=False, rank=32, bf16_adapters=False, range_method="minmax"
    )
    runs = {}
    for name, options in WAYS.items():
        small = {"act_group_size": 32} if args.smoke and "act_group_size" in options else {}
        model, _ = adapted("lrqat", {"group_size": -1, "downcast": "int", **options, **small}, setting, device)
        trained = [p for p in model.parameters() if p.requires_grad]
        runs[name] = step_of(model, rows, torch.optim.AdamW(trained, lr=1e-4))
    for run in runs.values():
        for _ in range(1 if args.smoke else 3):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2 if args.smoke else args.steps):
        for name, run in runs.items():
            seconds[name].append(timed(run, device))
    del runs
    gc.collect()
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def step_of(model: torch.nn.Module, rows: torch.Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A function that makes one training step."""

    def run() -> None:
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def rounding(device: str, tokens: int, widths: list[int]) -> list[dict[str, Any]]:
    """Microseconds of rounding an input, by the kernel and by its reference, and whether they agree."""
    found = []
    for width in widths:
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
        for rule in ACTIVATION_RULES:
            for bits, group_size in ((8, -1), (4, -1), (8, 32)):
                kernels: Any = kernels_for(x)
                ways = {"reference": rounded_inputs} | ({"kernel": kernels.rounded_inputs} if kernels else {})
                row: dict[str, Any] = {"width": width, "rule": rule, "bits": bits, "group_size": group_size}
                results = [way(x, rule, bits, group_size) for way in ways.values()]
                row["equal"] = all(torch.equal(result, results[0]) for result in results)
                for name, way in ways.items():

                    def ten(way: Any = way, how: tuple = (rule, bits, group_size), x: torch.Tensor = x) -> None:
                        for _ in range(10):
                            way(x, *how)

                    ten()
                    row[f"{name}_us"] = statistics.median(timed(ten, device) for _ in range(3)) * 1e5
                found.append(row)
    return found


def products(device: str, tokens: int, shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Microseconds of y = x W^T in bf16, and of int8 codes with a product of scales after it."""
    found = []
    for out_features, in_features in shapes:
        x = torch.randn(tokens, in_features, device=device, dtype=torch.bfloat16)
        weight = torch.randn(out_features, in_features, device=device, dtype=torch.bfloat16)
        codes = torch.randint(-8, 8, (out_features, in_features), device=device, dtype=torch.int8)
        inputs = torch.randint(-128, 128, (tokens, in_features), device=device, dtype=torch.int8)
        of_tokens, of_rows = torch.rand(tokens, 1, device=device), torch.rand(1, out_features, device=device)

        def bf16(x: Any = x, weight: Any = weight) -> None:
            for _ in range(10):
                torch.nn.functional.linear(x, weight)

        def int8(inputs: Any = inputs, codes: Any = codes, a: Any = of_tokens, b: Any = of_rows) -> None:
            for _ in range(10):
                (torch._int_mm(inputs, codes.t()) * a * b).to(torch.bfloat16)

        bf16(), int8()
        row = {"out": out_features, "in": in_features}
        row |= {name: timed(run, device) * 1e5 for name, run in (("bf16_us", bf16), ("int8_us", int8))}
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/activations.json")
    parser.add_argument("--layers", type=int, default=None, help="blocks; default 4, with --smoke 1")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a CPU")
    args = parser.parse_args()
    args.layers = args.layers or (1 if args.smoke else 4)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tokens, widths = (32, [128]) if args.smoke else (4096, list(WIDTHS))
    shapes = [(128, 128)] if args.smoke else [(4096, 4096), (11008, 4096), (4096, 11008)]
    result: dict[str, Any] = {
        "rounding": rounding(device, tokens, widths),
        "products": products(device, tokens, shapes),
    }
    for row in result["rounding"]:
        print(
            "  ".join(
                f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    for row in result["products"]:
        print("  ".join(f"{key} {value:.0f}" for key, value in row.items()))
    result["step_s"] = steps(args, device)
    plain = result["step_s"]["float activations"]
    for name, taken in result["step_s"].items():
        print(f"{name:32} {taken * 1e3:9.2f} ms a step  {100 * (taken / plain - 1):+6.1f} %")
    result |= {"layers": args.layers, "steps": args.steps, **provenance()}
    write_json(Path(args.out), result)


if __name__ == "__main__":
    main()
