"""A training step on the CPU: LR-QAT beside PEFT's LoRA on the same model.

    python benchmarks/cpu_step.py --out benchmarks/results/cpu_step.json

The model has SmolLM2-135M's shapes and random weights. Times: every method in one process, steps taken in turns,
medians, and the median of the ratios to LoRA's step of the same turn. Memory: each method in a process of its own, the
resident set after set-up and its peak over the steps, less what the process held before the model was made.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import provenance, write_json

METHODS = {
    "LoRA": None,
    "LR-QAT fx8, per channel": {"group_size": -1},
    "LR-QAT fx8, groups of 64": {"group_size": 64},
    "LR-QAT fx8, groups of 64, by channel": {"group_size": 64, "learn_scales": "channel"},
    "LR-QAT int4, per channel": {"group_size": -1, "downcast": "int"},
    "LR-QAT int4, groups of 64": {"group_size": 64, "downcast": "int"},
    "LR-QAT int4, groups of 64, scales alone": {"group_size": 64, "r": 0},
}


def make(method: str, rank: int, layers: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """An adapted model in training mode and its optimizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft_lrqat import LRQATConfig

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    common = {"r": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    options = METHODS[method]
    # min-max ranges: the search takes its time at the start and has no part in a step
    adapter = LoraConfig(**common) if options is None else LRQATConfig(**common | options, range_method="minmax")
    model = get_peft_model(model, adapter)
    gc.collect()
    model.train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: torch.Tensor) -> float:
    """Seconds of one forward, backward and update."""
    started = time.perf_counter()
    model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM the peak since it was last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def memory(args: argparse.Namespace) -> None:
    """One method's memory, as a line of JSON (run in a process of its own)."""
    from peft import LoraConfig  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from peft_lrqat import LRQATConfig  # noqa: F401

    before = resident("VmRSS")
    model, optimizer = make(args.memory, args.rank, args.layers)
    held = resident("VmRSS") - before
    rows = torch.randint(0, 49152, (1, args.tokens))
    step(model, optimizer, rows)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    for _ in range(2):
        step(model, optimizer, rows)
    print(json.dumps({"held_MiB": round(held), "peak_MiB": round(resident("VmHWM") - before)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/cpu_step.json")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--memory", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        memory(args)
        return
    methods = {name: make(name, args.rank, args.layers) for name in METHODS}
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for turn in range(args.steps + 1):
        rows = torch.randint(0, 49152, (1, args.tokens))
        for name, (model, optimizer) in methods.items():
            seconds = step(model, optimizer, rows)
            if turn:  # the first turn warms up
                times[name].append(seconds)
    del methods
    result: dict[str, object] = {**provenance(), **vars(args), "threads": torch.get_num_threads()}
    del result["memory"]
    rows_out = {}
    for name in METHODS:
        command = [sys.executable, __file__, "--memory", name, "--tokens", str(args.tokens)]
        command += ["--rank", str(args.rank), "--layers", str(args.layers)]
        used = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        # turn by turn, so that a busy machine slows both sides of a ratio
        ratios = [mine / lora for mine, lora in zip(times[name], times["LoRA"], strict=True)]
        rows_out[name] = {
            "seconds": statistics.median(times[name]),
            "ratio_to_LoRA": statistics.median(ratios),
            **used,
        }
    result["methods"] = rows_out
    write_json(Path(args.out), result)
    print("| method | s / step | ratio to LoRA | held, MiB | peak, MiB |\n|---|---|---|---|---|")
    for name, row in rows_out.items():
        print(f"| {name} | {row['seconds']:.2f} | {row['ratio_to_LoRA']:.2f} | {row['held_MiB']} | {row['peak_MiB']} |")


if __name__ == "__main__":
    main()
