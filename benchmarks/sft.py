"""Memory and step time as TRL trains: LoRA, QLoRA and LR-QAT through `SFTTrainer`, in one run.

    python benchmarks/sft.py --out benchmarks/results/sft.json                 # 7B shapes, 4x1024 and 1x1024 tokens
    python benchmarks/sft.py --memory --out benchmarks/results/sft_memory.json # 8-bit Adam, Liger, offloading for all
    python benchmarks/sft.py --graphs --out benchmarks/results/sft_graphs.json # without and with CUDA graphs
    python benchmarks/sft.py --profile --out benchmarks/results/sft_kernels.json # what each kernel takes of a step
    python benchmarks/sft.py --smoke                                           # does it run (on a CPU)

Random weights in Llama's shapes and random tokens; everything else is as `SFTConfig` and PEFT have it: bf16 autocast,
gradient checkpointing, fused AdamW, fp32 adapters, the accuracy that TRL logs. One method after the other, each on an
empty GPU. Seconds a step: the median of `--steps` times from the end of a step to the end of the next, on a
synchronised GPU; the peak is that of these steps, as torch counts allocated bytes, and what graphs hold beside it.
Scales are min-max ones, which take no search.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import graph_pools, provenance, write_json
from gpu import SHAPES, fill, held, kernel_times, nf4, peak, reset_peak, skeleton
from transformers import TrainerCallback

#: name -> (kind, options of its configuration). `None`: README's example, at its own rank.
METHODS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "LoRA": ("lora", {}),
    "QLoRA": ("qlora", {}),
    "LR-QAT as it comes (fx8, groups of 128)": ("lrqat", {}),
    "LR-QAT, README's example": ("lrqat", None),
    "LR-QAT fx8, groups of 128, by channel": ("lrqat", {"learn_scales": "channel"}),
    "LR-QAT fx8, per channel": ("lrqat", {"group_size": -1}),
    "LR-QAT int4, groups of 128": ("lrqat", {"downcast": "int"}),
    "LR-QAT int4, groups of 128, by channel": ("lrqat", {"downcast": "int", "learn_scales": "channel"}),
    "LR-QAT int4, groups of 128, scales alone": ("lrqat", {"r": 0}),
    "LR-QAT int4, per channel": ("lrqat", {"downcast": "int", "group_size": -1}),
}
MEMORY = {"optim": "adamw_bnb_8bit", "use_liger_kernel": True, "activation_offloading": True}


class Clock(TrainerCallback):
    """Times from the end of a step to the end of the next, and the peak of those after the first `warm`."""

    def __init__(self, device: str, warm: int) -> None:
        self.device, self.warm, self.ends = device, warm, []  # type: ignore[var-annotated]
        self.pools = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if state.global_step == self.warm:
            reset_peak(self.device)
            self.pools = graph_pools(self.device)

    def seconds(self, steps: int | None = None) -> list[float]:
        ends = self.ends[self.warm - 1 :][: steps and steps + 1]
        return [later - earlier for earlier, later in pairwise(ends)]


class Kernels(TrainerCallback):
    """What the GPU does in one step, the last: `spent` by kind of kernel, `longest` kernels; milliseconds."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.record: Any = None
        self.spent: dict[str, float] = {}
        self.longest: list[tuple[float, int, str]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.record = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.record.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.record is not None:
            torch.cuda.synchronize()
            self.record.stop()
            self.spent, found = kernel_times(self.record)
            self.longest = [(spent, count, name[:80]) for spent, count, name in found[:24]]
            self.record = None

    def found(self) -> dict[str, Any]:
        return {"gpu_ms": sum(self.spent.values()), "kernels_ms": self.spent, "longest_ms": self.longest}


def tokenizer() -> Any:
    """`SFTTrainer` wants one, for padding; the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def peft_config(kind: str, options: dict[str, Any] | None, args: argparse.Namespace) -> Any:
    from peft import LoraConfig

    from peft_lrqat import LRQATConfig

    shared = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if kind != "lrqat":
        return LoraConfig(r=args.rank, **shared)
    group = {"group_size": 32} if args.smoke and "group_size" not in (options or {}) else {}
    if options is None:
        return LRQATConfig(**{"bits": 4, "group_size": 128, **shared, "range_method": "minmax", **group})
    return LRQATConfig(**{"r": args.rank, "range_method": "minmax", **shared, **options, **group})


def trainer_of(
    model: Any, config: Any, rows: torch.Tensor, device: str, folder: str, callbacks: list[Any], **options: Any
) -> Any:
    """An `SFTTrainer` with TRL's defaults.

    Args:
        config: PEFT's; None: the model is adapted already.
        rows: token ids (rows, tokens); all have the batch size and the steps that `options` say.
        options: of SFTConfig.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        folder,
        max_length=rows.shape[1],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        **options,
    )
    return SFTTrainer(
        model,
        settings,
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=callbacks,
    )


def measure(name: str, args: argparse.Namespace, device: str, folder: str) -> list[dict[str, Any]]:
    """Seconds a step and peak for every batch shape; with `--graphs` a second row for the same model with them."""
    from peft_lrqat import CudaGraphCallback

    kind, options = METHODS[name]
    model: Any = skeleton(args.size, args.layers, keep_rng_state=True)
    fill(model, device)
    if kind == "qlora":
        nf4(model)
    config = peft_config(kind, options, args)
    rows_of = {
        graphs: {"method": name, "size": args.size, "memory": args.memory, "graphs": graphs, "steps": {}}
        for graphs in ((False, True) if args.graphs else (False,))
    }
    for shape, graphs in itertools.product(args.batches, rows_of):
        row: dict[str, Any] = rows_of[graphs]
        batch, length = (int(n) for n in shape.split("x"))
        count = args.warm + args.steps + args.profile
        rows = torch.randint(3, 32000, (batch * count, length), generator=torch.Generator().manual_seed(1))
        clock = Clock(device, args.warm)
        kernels = Kernels(args.warm + args.steps)
        callbacks = [clock, *([CudaGraphCallback()] if graphs else []), *([kernels] if args.profile else [])]
        options = {"max_steps": count, "per_device_train_batch_size": batch, **(MEMORY if args.memory else {})}
        trainer = trainer_of(model, config, rows, device, folder, callbacks, **options)
        model, config = trainer.model, None  # adapted now
        gc.collect()
        row.setdefault("static_gib", held(device))
        row.setdefault("trained", sum(p.numel() for p in model.parameters() if p.requires_grad))
        loss = trainer.train().training_loss
        row["steps"][shape] = {
            "seconds": statistics.median(clock.seconds(args.steps)),
            "peak_gib": peak(device) + clock.pools,
            "loss": loss,
            **(kernels.found() if args.profile else {}),
        }
        trainer.accelerator.free_memory()
        del trainer, clock, kernels, callbacks
        gc.collect()
    return list(rows_of.values())


def missing(kind: str, memory: bool) -> list[str]:
    """Packages that a row needs and that are not there."""
    wanted = ["bitsandbytes"] if kind == "qlora" or memory else []
    return [name for name in [*wanted, *(["liger_kernel"] if memory else [])] if importlib.util.find_spec(name) is None]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", choices=SHAPES, default="7B")
    parser.add_argument("--layers", type=int, help="fewer blocks than the size has")
    parser.add_argument("--batches", nargs="+", default=["4x1024", "1x1024"])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--memory", action="store_true", help="8-bit Adam, Liger and activation offloading, for all")
    parser.add_argument("--graphs", action="store_true", help="each method without and with CUDA graphs")
    parser.add_argument("--profile", action="store_true", help="one step more, with what each kernel takes of it")
    parser.add_argument("--only", nargs="+", choices=METHODS)
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.profile = args.profile and torch.cuda.is_available()
    if args.smoke:
        args.size, args.batches, args.warm, args.steps = "tiny", ["2x16", "1x16"], 1, 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = {key: value for key, value in vars(args).items() if key != "out"}
    found: dict[str, Any] = {"runs": [], "left_out": {}}
    for name in args.only or METHODS:
        if packages := missing(METHODS[name][0], args.memory):
            found["left_out"][name] = packages
            print(f"{name:40} left out: {', '.join(packages)} not installed", flush=True)
            continue
        # a process for each: optimizers and offloading of others' packages keep some memory when they are gone
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, context) as process:
            rows = process.submit(measure, name, args, device, folder).result()
        found["runs"] += [{**row, "command": command, **provenance()} for row in rows]
        if args.out:
            write_json(args.out, found)
        for row in rows:
            parts = [f"{shape}: {v['seconds']:.3f} s {v['peak_gib']:.2f} GiB" for shape, v in row["steps"].items()]
            called = f"{name}, graphs" if row["graphs"] else name
            print(f"{called:48} static {row['static_gib']:.2f}  {'  '.join(parts)}", flush=True)
            for shape, v in row["steps"].items() if args.profile else ():
                shown = ", ".join(f"{kind} {spent:.0f}" for kind, spent in v["kernels_ms"].items() if spent >= 0.5)
                print(f"  {shape}, {v['gpu_ms']:.0f} ms of the GPU: {shown}", flush=True)


if __name__ == "__main__":
    main()
