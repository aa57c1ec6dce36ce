"""What rounding activations, and the KV cache, costs: a training step of LR-QAT, the kernel alone, int8 products.

    python benchmarks/activations.py --out benchmarks/results/activations.json     # a GPU, about two minutes
    python benchmarks/activations.py --smoke --out /tmp/activations.json           # a CPU, tiny: does it run

Some blocks of Llama 2 7B with random weights, 4-bit LR-QAT of rank 32 on every linear layer but the head, bf16, block
checkpointing, fused AdamW, 4 x 1024 random tokens. Steps of the ways alternate, each round in another order, so that a
clock that changes hits all of them alike, and Python's garbage collector waits; each step is compared with the one of
float activations and a float cache in its round. Medians of `--steps` rounds. Where Python is slow, or the machine
busy, that hides what kernels cost, so their time in a step is summed up as well (torch.profiler). Operations are timed
alone too, and kernels are compared with their references on the device first, number by number.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from operator import truediv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import LLAMA, provenance, write_json
from gpu import adapted, optimizer_for

from peft_lrqat import calibrate_activations
from peft_lrqat.ops.dispatch import kernels_for, use_kernels
from peft_lrqat.ops.kv_cache import CACHE_BITS, CACHE_RULES, CacheRounding, round_states
from peft_lrqat.ops.reference_inputs import ACTIVATION_RULES, rounded_inputs
from peft_lrqat.ops.static_inputs import LearnedScale, round_learned

FLOAT = "W4A16"
#: Name -> LRQATConfig options.
WAYS: dict[str, dict[str, Any]] = {
    FLOAT: {},
    "W4A8": {"act_bits": 8},
    "W4A8KV8": {"act_bits": 8, "kv_bits": 8},
    "W4A8KV4": {"act_bits": 8, "kv_bits": 4},
    "W4A4KV4": {"act_bits": 4, "kv_bits": 4},
    "W4A8, vLLM's rule": {"act_bits": 8, "act_rule": "vllm"},
    "W4A8KV8, vLLM's rules": {"act_bits": 8, "act_rule": "vllm", "kv_bits": 8, "kv_rule": "vllm"},
    "W4A8KV4, vLLM's rules": {"act_bits": 8, "act_rule": "vllm", "kv_bits": 4, "kv_rule": "vllm"},
    "W4A4KV4, vLLM's rules": {"act_bits": 4, "act_rule": "vllm", "kv_bits": 4, "kv_rule": "vllm"},
    "W4A8, groups of 128": {"act_bits": 8, "act_group_size": 128},
    "W4A8, fixed scales": {"act_bits": 8, "act_scale": "static"},
    "W4A16KV8": {"kv_bits": 8},
    "W4A16KV4": {"kv_bits": 4},
    "W4A16KV8, vLLM's rule": {"kv_bits": 8, "kv_rule": "vllm"},
    "W4A16KV4, vLLM's rule": {"kv_bits": 4, "kv_rule": "vllm"},
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


def median_us(run: Callable[[], Any], device: str, times: int = 5) -> float:
    """Microseconds of one of ten calls in a row, after ten to warm up: the median of `times` such rows."""

    def ten() -> None:
        for _ in range(10):
            run()

    ten()
    return statistics.median(timed(ten, device) for _ in range(times)) * 1e5


def steps(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """A training step, by way: its median and shortest time in ms, how long Python took of it, by how much more it
    takes than the step of `FLOAT` in its round, the median; on a GPU the time of its kernels, beside `FLOAT`'s."""
    size = "tiny" if args.smoke else "7B"
    batch, length = (2, 16) if args.smoke else (4, 1024)
    ids = torch.randint(0, 32000, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)
    setting = SimpleNamespace(
        size=size, layers=args.layers, graph=False, from_cpu=False, rank=32, bf16_adapters=False, range_method="minmax"
    )
    runs = {}
    for name, options in WAYS.items():
        if args.only and name not in (FLOAT, *args.only):
            continue
        small = {"act_group_size": 32} if args.smoke and "act_group_size" in options else {}
        model, _ = adapted("lrqat", {"group_size": -1, "downcast": "int", **options, **small}, setting, device)
        if options.get("act_scale") == "static":
            calibrate_activations(model, [ids])
        runs[name] = step_of(model, ids, optimizer_for(model, "lrqat", {}, lean=False))
    for run in runs.values():
        for _ in range(1 if args.smoke else 3):
            run()
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    python: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    for turn in range(2 if args.smoke else args.steps):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(timed(partial(noted, runs[name], python[name]), device))
    gc.enable()
    kernels = {name: kernel_ms(run) for name, run in runs.items()} if device == "cuda" else {}
    del runs
    gc.collect()
    rows = []
    for name, taken in seconds.items():
        row = {"way": name, "step_ms": statistics.median(taken) * 1e3, "least_ms": min(taken) * 1e3}
        row["python_ms"] = statistics.median(python[name]) * 1e3
        row["more_percent"] = 100 * (statistics.median(map(truediv, taken, seconds[FLOAT])) - 1)
        if kernels:
            row["kernels_ms"] = kernels[name]
            row["more_kernels_percent"] = 100 * (kernels[name] / kernels[FLOAT] - 1)
        rows.append(row)
    return rows


def kernel_ms(run: Callable[[], None], times: int = 3) -> float:
    """Milliseconds that the GPU works on one of `times` steps, the sum over its kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in record.key_averages()) / 1000 / times


def noted(run: Callable[[], None], seconds: list[float]) -> None:
    """Run, and note how long that took before the device was waited for."""
    begin = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - begin)


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
                    row[f"{name}_us"] = median_us(partial(way, x, rule, bits, group_size), device)
                found.append(row)
    return found


def caches(device: str, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """Microseconds of rounding the keys (or the values) of a layer, (batch, heads, tokens, head size), which lie token
    by token, with kernels and without; and whether both agree.
    """
    batch, heads, tokens, size = shape
    states = torch.randn(batch, tokens, heads, size, device=device, dtype=torch.bfloat16).transpose(1, 2)
    found = []
    for rule in CACHE_RULES:
        for bits in CACHE_BITS:
            run = partial(round_states, states, CacheRounding(bits, rule, size if rule == "transformers" else None))
            with use_kernels(False):
                expected, reference_us = run(), median_us(run, device)
            row = {"rule": rule, "bits": bits, "equal": torch.equal(run(), expected)}
            found.append(row | {"us": median_us(run, device), "reference_us": reference_us})
    return found


def fixed(device: str, tokens: int, widths: list[int]) -> list[dict[str, Any]]:
    """Microseconds of rounding an input with a fixed scale, and of forward and backward together, the scale's own
    included, with kernels and without; whether both agree, and by how much the scale's gradients differ.
    """
    found = []
    for width in widths:
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        log2, dy = torch.tensor([-5.03], device=device, requires_grad=True), torch.randn_like(x)

        def forward(x: Any = x, log2: Any = log2) -> torch.Tensor:
            return round_learned(x, LearnedScale(log2, "auto", 8))

        def both(x: Any = x, log2: Any = log2, dy: Any = dy, forward: Any = forward) -> tuple[torch.Tensor, ...]:
            y = forward()
            return (y, *torch.autograd.grad(y, [x, log2], dy))

        with use_kernels(False):
            y, dx, dlog2 = both()
            times = {"reference_us": median_us(forward, device), "reference_both_us": median_us(both, device)}
        y2, dx2, dlog22 = both()
        times |= {"us": median_us(forward, device), "both_us": median_us(both, device)}
        off = float((dlog22 - dlog2).abs() / dlog2.abs())
        found.append({"width": width, "equal": torch.equal(y, y2) and torch.equal(dx, dx2), "off": off, **times})
    return found


def products(device: str, tokens: int, shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Microseconds of y = x W^T in bf16, and of int8 codes times scales; rounding x is in neither."""
    found = []
    for out_features, in_features in shapes:
        x = torch.randn(tokens, in_features, device=device, dtype=torch.bfloat16)
        weight = torch.randn(out_features, in_features, device=device, dtype=torch.bfloat16)
        codes = torch.randint(-8, 8, (out_features, in_features), device=device, dtype=torch.int8)
        inputs = torch.randint(-128, 128, (tokens, in_features), device=device, dtype=torch.int8)
        of_tokens, of_rows = torch.rand(tokens, 1, device=device), torch.rand(1, out_features, device=device)

        def int8(inputs: Any = inputs, codes: Any = codes, a: Any = of_tokens, b: Any = of_rows) -> torch.Tensor:
            return (torch._int_mm(inputs, codes.t()) * a * b).to(torch.bfloat16)

        bf16_us = median_us(partial(torch.nn.functional.linear, x, weight), device)
        found.append({"out": out_features, "in": in_features, "bf16_us": bf16_us, "int8_us": median_us(int8, device)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/activations.json")
    parser.add_argument("--layers", type=int, default=None, help="blocks; default 4, with --smoke 1")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=WAYS, metavar="WAY", help="steps of these alone")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a CPU")
    args = parser.parse_args()
    args.layers = args.layers or (1 if args.smoke else 4)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tokens, widths = (32, [128]) if args.smoke else (4096, list(WIDTHS))
    shapes = [(128, 128)] if args.smoke else [(4096, 4096), (11008, 4096), (4096, 11008)]
    result: dict[str, Any] = {}
    if not args.only:
        result |= {
            "rounding": rounding(device, tokens, widths),
            "caches": caches(device, (2, 2, 16, 32) if args.smoke else (4, 32, 1024, 128)),
            "fixed": fixed(device, tokens, widths),
            "products": products(device, tokens, shapes),
        }
    result["runs"] = steps(args, device)
    for row in [row for rows in result.values() for row in rows]:
        shown = (f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("  ".join(shown))
    result |= {"layers": args.layers, "steps": args.steps, **provenance()}
    write_json(Path(args.out), result)


if __name__ == "__main__":
    main()
