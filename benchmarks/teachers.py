"""What a teacher costs: memory and step time as TRL trains, with the float model, kept in each way, or stored logits.

    python benchmarks/teachers.py --out benchmarks/results/teachers.json     # 7B shapes; 13 GB of disk for the teacher
    python benchmarks/teachers.py --smoke                                    # does it run (on a CPU)

`SFTTrainer` with its defaults on random weights in Llama's shapes; LR-QAT packed to 4 bits in groups of 128, the same
student for all ways, in one run. Times and peaks are those of `sft.py`; peaks include the teacher.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import provenance, write_json
from gpu import SHAPES, fill, held, peak, skeleton
from sft import Clock, trainer_of

from peft_lrqat import Distillation, LRQATConfig, store_logits

#: name -> the teacher's place ("logits": stored ones), and `keep`
WAYS: dict[str, tuple[str, str | None]] = {
    "no teacher": ("", None),
    "float teacher": ("teacher", None),
    "teacher in 8 bits": ("teacher", "int8"),
    "teacher in the CPU's memory": ("teacher", "cpu"),
    "stored logits": ("logits", None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", choices=SHAPES, default="7B")
    parser.add_argument("--layers", type=int, help="fewer blocks than the size has")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.smoke:
        args.size, args.length, args.warm, args.steps = "tiny", 16, 1, 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = skeleton(args.size, args.layers, keep_rng_state=True)
    fill(model, device)
    config: Any = LRQATConfig(
        downcast="int",
        range_method="minmax",
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=32,
        **({"group_size": 32} if args.smoke else {}),
    )
    count = args.warm + args.steps
    rows = torch.randint(3, 32000, (args.batch * count, args.length), generator=torch.Generator().manual_seed(1))
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/teacher")
        for name in args.ways or WAYS:
            place, keep = WAYS[name]
            clock = Clock(device, args.warm)
            callbacks: list[Any] = [clock, Distillation(f"{folder}/{place}", keep=keep)] if place else [clock]
            options = {"max_steps": count, "per_device_train_batch_size": args.batch}
            trainer = trainer_of(model, config, rows, device, f"{folder}/out", callbacks, **options)
            model, config = trainer.model, None  # adapted now
            row: dict[str, Any] = {"way": name, "keep": keep, "size": args.size}
            if place == "logits":
                began = time.perf_counter()
                store_logits(trainer, f"{folder}/logits", f"{folder}/teacher", k=64)
                row["store_seconds"] = time.perf_counter() - began
                row["store_bytes"] = sum(p.stat().st_size for p in Path(folder, "logits").rglob("*") if p.is_file())
                gc.collect()
            trainer.train()
            row |= {"seconds": statistics.median(clock.seconds()), "peak_gib": peak(device)}
            trainer.accelerator.free_memory()
            del trainer, clock, callbacks
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
            row["held_gib"] = held(device)
            command = {key: value for key, value in vars(args).items() if key != "out"}
            found.append({**row, "command": command, **provenance()})
            print(f"{name:30} {row['seconds']:.3f} s  {row['peak_gib']:.2f} GiB", flush=True)
            if args.out:
                write_json(args.out, {"runs": found})


if __name__ == "__main__":
    main()
