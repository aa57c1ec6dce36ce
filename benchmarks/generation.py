"""Seconds a token of HF `generate`: both methods, adapted and merged, beside the float model and PEFT's LoRA.

    python benchmarks/generation.py --shapes 1b --out benchmarks/results/generation_gpu.json        # bf16, one GPU
    python benchmarks/generation.py --shapes smollm2 --out benchmarks/results/generation_cpu.json   # fp32, CPU

Random weights in the shapes of TinyLlama 1.1B or SmolLM2-135M, rank 32 on all linear layers, groups of 64, greedy
decoding from random prompts of 16 tokens. All variants live in one process and take turns, after one turn that warms
up; figures are medians over turns: milliseconds to the first token (the prompt, and what a call builds once), and
milliseconds a token after it. "kept off": the same model with `limit_kept_weights(0)`; the tokens must be the same.
Memory: before, at the peak of, and after one call; on a GPU what torch has allocated, on a CPU the process's resident
set. `--cpu-time` counts the process's CPU time, for machines that others use.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import LLAMA, provenance, write_json
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from peft_lrqat import LowBitSRConfig, LRQATConfig, limit_kept_weights

MIB = 2**20
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {**LLAMA["1B"], "vocab_size": 32000},
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 256,
    },
}
METHODS: dict[str, Any] = {
    "LR-QAT": lambda common: LRQATConfig(**common, r=32, bits=4, group_size=64, range_method="minmax"),
    "low-bit SR": lambda common: LowBitSRConfig(**common, bits=4, group_size=64, range_method="minmax"),
}
LIMITS = {"": None, ", kept off": 0}


def models(args: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """Every variant: float, LoRA, and each method adapted, after `merge_adapter()` and after `merge_and_unload()`."""
    config = LlamaConfig(**SHAPES[args.shapes], eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(args.device):
        base = LlamaForCausalLM(config).to(args.dtype).eval()
    common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    found: dict[str, torch.nn.Module] = {"float": base}
    found["LoRA"] = moved(get_peft_model(copy.deepcopy(base), LoraConfig(**common, r=32)))
    for name, make in METHODS.items():
        adapted = moved(get_peft_model(copy.deepcopy(base), make(common)))
        found[f"{name}, adapted"] = adapted
        in_place = copy.deepcopy(adapted)
        in_place.merge_adapter()
        found[f"{name}, merge_adapter"] = in_place
        found[f"{name}, merged"] = copy.deepcopy(adapted).merge_and_unload()
    return {name: model.eval() for name, model in found.items()}


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The model with an adapter that does something."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM the peak since it was last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def memory(device: str, into: dict[str, float]) -> Iterator[None]:
    """MiB before, at the peak and after what is done inside."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
    yield
    if device == "cuda":
        after, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    else:
        after, peak = resident("VmRSS"), resident("VmHWM")
    into.update({"before": before / MIB, "peak_more": (peak - before) / MIB, "after_more": (after - before) / MIB})


def generate(model: Any, prompts: torch.Tensor, args: argparse.Namespace) -> tuple[torch.Tensor, float, float]:
    """The tokens of one call, seconds to the first of them, and seconds a token after it."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = [clock()]

    def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        times.append(clock())
        return scores

    out = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=args.tokens,
        min_new_tokens=args.tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([note]),
    )
    return out, times[1] - times[0], (times[-1] - times[1]) / (len(times) - 2)


def measure(variants: dict[str, tuple[torch.nn.Module, int | None]], batch: int, args: argparse.Namespace) -> dict:
    """Variant -> milliseconds, ratios to float and LoRA (medians over turns), and memory in MiB."""
    vocabulary = SHAPES[args.shapes]["vocab_size"]
    prompts = torch.randint(3, vocabulary, (batch, 16), generator=torch.Generator().manual_seed(1)).to(args.device)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    first: dict[str, list[float]] = {name: [] for name in variants}
    held: dict[str, dict[str, float]] = {name: {} for name in variants}
    tokens: dict[str, torch.Tensor] = {}
    for turn in range(args.turns + 1):
        for name, (model, limit) in variants.items():
            limit_kept_weights(limit)
            with memory(args.device, held[name]):
                tokens[name], to_first, spent = generate(model, prompts, args)
            if turn:  # the first warms up
                seconds[name].append(spent)
                first[name].append(to_first)
    for name in variants:
        if name.endswith(", kept off"):
            assert torch.equal(tokens[name], tokens[name.removesuffix(", kept off")]), f"{name}: other tokens"
    rows = {}
    for name, spent in seconds.items():
        to = {
            other: round(statistics.median(a / b for a, b in zip(spent, seconds[other], strict=True)), 3)
            for other in ("float", "LoRA")
        }
        rows[name] = {
            "ms_to_first": round(1000 * statistics.median(first[name]), 2),
            "ms_per_token": round(1000 * statistics.median(spent), 2),
            "to_float": to["float"],
            "to_LoRA": to["LoRA"],
            "memory_MiB": {key: round(value, 1) for key, value in held[name].items()},
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", choices=SHAPES, default="1b")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a call")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--without-off", action="store_true", help="leave the variants that keep nothing out")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time, not the clock's")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    made = models(args)
    variants = {
        name + suffix: (model, limit)
        for name, model in made.items()
        for suffix, limit in LIMITS.items()
        if limit is None or not (name in ("float", "LoRA") or args.without_off)
    }
    result: dict[str, Any] = {
        **provenance(),
        "shapes": args.shapes,
        "dtype": str(args.dtype),
        "threads": torch.get_num_threads(),
        "clock": "CPU time" if args.cpu_time else "wall",
        "tokens": args.tokens,
        "turns": args.turns,
        "batches": {},
    }
    for batch in args.batches:
        rows = result["batches"][str(batch)] = measure(variants, batch, args)
        heads = f"{'first ms':>10}{'ms/token':>10}{'/ float':>9}{'/ LoRA':>9}{'peak MiB':>10}{'after':>8}"
        print(f"\nbatch {batch:<32}{heads}")
        for name, row in rows.items():
            grown = row["memory_MiB"]
            print(
                f"{name:<38}{row['ms_to_first']:>10.1f}{row['ms_per_token']:>10.1f}{row['to_float']:>9.2f}{row['to_LoRA']:>9.2f}"
                f"{grown['peak_more']:>10.0f}{grown['after_more']:>8.0f}"
            )
        write_json(args.out, result)


if __name__ == "__main__":
    main()
