"""A model that fits no card in float: quantized while it is loaded from shards, trained, merged and saved.

    python benchmarks/large.py --out benchmarks/results/large.json      # Llama 3 70B's shapes: 141 GB on disk, and 40
    python benchmarks/large.py --layers 30                              # 30 of its 80 blocks
    python benchmarks/large.py --size 0.3B --device cpu                 # a small machine
    python benchmarks/large.py --smoke                                  # does it run

A checkpoint with random bf16 weights is written shard by shard (`loading.py`) and loaded with `for_loading()`; then
come a few steps of one row of random tokens (gradient checkpointing, AdamW, bf16), `merge_and_unload`, and
`save_pretrained` in shards. For each phase: seconds, the peak of what torch has allocated on the GPU, and the peak of
the process's anonymous memory on the CPU above what it held at the start (mapped files do not count, see `loading.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import provenance, write_json
from loading import SIZES, Peak, anonymous_bytes, write_checkpoint

GIB = 2**30
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 256,
}


class Phases:
    """What was measured, phase by phase."""

    def __init__(self, device: str) -> None:
        self.device, self.found = device, {}  # type: ignore[var-annotated]
        gc.collect()
        self.start = anonymous_bytes()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[dict[str, Any]]:
        gc.collect()
        on_gpu = self.device != "cpu"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        peak = Peak()
        peak.start()
        begin, row = time.perf_counter(), {}
        yield row
        if on_gpu:
            torch.cuda.synchronize()
            row["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / GIB
            row["held_gpu_gib"] = torch.cuda.memory_allocated() / GIB
        row["seconds"] = time.perf_counter() - begin
        peak.stopped.set()
        peak.join()
        row["peak_cpu_gib"] = (peak.peak - self.start) / GIB
        row["held_cpu_gib"] = (anonymous_bytes() - self.start) / GIB
        self.found[name] = row
        print(f"{name:8}", "  ".join(f"{key} {value:.3g}" for key, value in row.items() if key != "steps"), flush=True)


def measure(folder: Path, shape: dict[str, int], args: argparse.Namespace) -> dict[str, Any]:
    """All phases; `folder` gets the checkpoint and the merged model."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from peft_lrqat import LRQATConfig

    options = {"bits": args.bits, "group_size": args.group_size, "downcast": args.downcast, "r": args.rank}
    config = LRQATConfig(**options, range_method=args.range_method, target_modules="all-linear", task_type="CAUSAL_LM")
    phase = Phases(args.device)
    if not (folder / "float" / "config.json").exists():
        with phase("write") as row:
            (folder / "float").mkdir(parents=True, exist_ok=True)
            write_checkpoint(folder / "float", shape, "bfloat16")
    with phase("load") as row:
        model = AutoModelForCausalLM.from_pretrained(
            folder / "float",
            dtype=torch.bfloat16,
            device_map={"": args.device},
            quantization_config=config.for_loading(),
        )
        row["weights"] = sum(p.numel() for p in model.parameters())
    with phase("adapt"):
        model = get_peft_model(model, config)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    rows = torch.randint(shape["vocab_size"], (1, args.tokens), device=args.device)
    with phase("steps") as row:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        row["steps"] = []
        for _ in range(args.steps):
            begin = time.perf_counter()
            with torch.autocast(args.device.partition(":")[0], torch.bfloat16):
                loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            row["loss"] = loss.item()  # waits for the GPU
            row["steps"].append(time.perf_counter() - begin)
    optimizer = loss = None
    with phase("merge"):
        model = model.merge_and_unload()
    with phase("save") as row:
        model.save_pretrained(folder / "merged", max_shard_size=args.shard)
        row["gb"] = sum(file.stat().st_size for file in (folder / "merged").glob("*.safetensors")) / 1e9
    return phase.found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="70B")
    parser.add_argument("--layers", type=int, help="fewer blocks than the size has")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--downcast", default="int")
    parser.add_argument("--range-method", default="minmax", help="'lp' searches, for many minutes with 70B")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--shard", default="5GB", help="largest file of the merged model")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is to be written and kept")
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shape = SIZES[args.size]
    if args.smoke:
        shape, args.tokens, args.group_size, args.steps = TINY, 32, 32, 1
    shape = {"vocab_size": 32000, **shape}
    if args.layers:
        shape = {**shape, "num_hidden_layers": args.layers}
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(args.folder or Path(scratch), shape, args)
    if args.out:
        command = {key: str(value) for key, value in vars(args).items() if key not in ("out", "folder")}
        write_json(args.out, {**provenance(), "command": command, "shape": shape, "phases": found})


if __name__ == "__main__":
    main()
