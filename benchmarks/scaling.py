"""One GPU beside several: memory of a rank, seconds of a step, what is sent, and whether the training is the same.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json                  # two GPUs, two minutes
    python benchmarks/scaling.py --processes 8 --out benchmarks/results/scaling_8.json
    python benchmarks/scaling.py --smoke --out scaling.json                             # two processes on a CPU

`SFTTrainer` under torchrun, as sft.py has it: random weights in Llama's shapes made on each GPU, random tokens, TRL's
defaults. First one process that takes as many batches a step as there will be processes (gradient accumulation), then
those processes, with a batch each (DDP). So both train on the same tokens. All ranks' parameters, by a checksum, all
losses and gradient norms are compared with the first's. Seconds and peaks are measured as in sft.py, on every rank.
What is sent is what DDP's reducer says that it reduces, and for how long; it samples the first steps.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from common import provenance, write_json
from gpu import SHAPES, fill, held, peak, skeleton

METHODS = ("LR-QAT int4, groups of 128", "LoRA")
#: of DDP's logging data -> name and unit here; times are in nanoseconds there
LOGGED = {
    "avg_backward_comm_time": "reducing_s",
    "avg_backward_compute_comm_overlap_time": "of_it_beside_backward_s",
    "avg_backward_compute_time": "backward_s",
    "avg_forward_compute_time": "forward_s",
}


def digest(model: torch.nn.Module) -> str:
    """Of all that is trained; a sum of bits by position, modulo 2^64, for each parameter."""
    from peft_lrqat.tuners.common.fingerprint import position_weighted_sum

    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    sums = [int(position_weighted_sum(tensor.reshape(len(tensor), -1), 1)) for tensor in trained]
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def trained(size: str, method: str, args: argparse.Namespace, device: str, folder: str) -> dict[str, Any]:
    """This rank's figures of a training; all that it held is free again."""
    import sft

    world = int(os.environ["WORLD_SIZE"])
    kind, options_of = sft.METHODS[method]
    model: Any = skeleton(size, args.layers, keep_rng_state=True)
    fill(model, device)
    batch, length = (int(n) for n in args.batch.split("x"))
    count = args.warm + args.steps
    rows = torch.randint(3, 32000, (count * args.processes * batch, length), generator=torch.Generator().manual_seed(1))
    clock = sft.Clock(device, args.warm)
    options = {
        "max_steps": count,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": args.processes // world,
        "logging_steps": 1,
    }
    config = sft.peft_config(kind, options_of, args)
    trainer = sft.trainer_of(model, config, rows, device, folder, [clock], **options)
    model = trainer.model
    gc.collect()
    static = held(device)
    trainer.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    found: dict[str, Any] = {
        "seconds": statistics.median(clock.seconds()),
        "peak_gib": peak(device),
        "static_gib": static,
        "trained": sum(parameter.numel() for parameter in parameters),
        "trained_bytes": sum(parameter.nbytes for parameter in parameters),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "digest": digest(model),
        "wrapped_in": type(trainer.model_wrapped).__name__,
    }
    wrapped: Any = trainer.model_wrapped
    if hasattr(wrapped, "_get_ddp_logging_data"):
        logged = wrapped._get_ddp_logging_data()
        sizes = [int(size) for size in str(logged["bucket_sizes"]).split(", ")]
        found["sent"] = {"reduced_bytes": sum(sizes), "buckets": len(sizes), "broadcast_bytes": buffers}
        found["sent"] |= {name: logged[key] / 1e9 for key, name in LOGGED.items() if logged.get(key)}
    kept = weakref.ref(model)
    trainer.accelerator.free_memory()
    del trainer, model, parameters, clock, wrapped
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    if kept() is not None:
        raise RuntimeError(f"{method} is still held, so that the next peak would count it too.")
    return found


def worker(args: argparse.Namespace) -> None:
    """One process: all sizes and methods; rank 0 writes what all found."""
    import torch.distributed as dist

    device = "cpu" if args.smoke else "cuda"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    runs = []
    for size in args.sizes:
        for method in args.only:
            with tempfile.TemporaryDirectory() as folder:
                mine = trained(size, method, args, device, folder)
            ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, mine)
            runs.append({"size": size, "method": method, "processes": len(ranks), **together(ranks)})
    if dist.get_rank() == 0:
        args.worker.write_text(json.dumps(runs), encoding="utf-8")
    dist.destroy_process_group()


def together(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank 0's figures; the slowest rank's seconds and the fullest one's peak."""
    return ranks[0] | {
        "seconds": max(rank["seconds"] for rank in ranks),
        "peak_gib": max(rank["peak_gib"] for rank in ranks),
        "ranks": [{key: rank[key] for key in ("seconds", "peak_gib", "static_gib")} for rank in ranks],
        "ranks_identical": len({rank["digest"] for rank in ranks}) == 1,
    }


def start(processes: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs of so many processes, each started as users start them."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(processes))), "OMP_NUM_THREADS": "4"}
    if args.smoke:
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "runs.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        subprocess.run([*launch, __file__, *sys.argv[1:], "--worker", str(out)], env=env, check=True)
        return json.loads(out.read_text(encoding="utf-8"))


def compared(alone: dict[str, Any], many: dict[str, Any]) -> dict[str, Any]:
    """How the training of several processes differs from one's, and how much less time it takes."""
    off = {name: max(abs(a - b) for a, b in zip(alone[name], many[name], strict=True)) for name in ("losses", "norms")}
    return {
        "losses_off": off["losses"],
        "norms_off": off["norms"],
        "parameters_equal": alone["digest"] == many["digest"],
        "times_as_fast": alone["seconds"] / many["seconds"],
        "more_gib": many["peak_gib"] - alone["peak_gib"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2, help="of one host, a GPU each")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["7B", "13B"])
    parser.add_argument("--layers", type=int, help="fewer blocks than the sizes have")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", default="4x1024", help="of a process")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.sizes, args.batch, args.warm, args.steps = ["tiny"], "2x16", 1, 2
    if args.worker:
        return worker(args)
    command = {key: value for key, value in vars(args).items() if key not in ("out", "worker")}
    found: dict[str, Any] = {"command": command, **provenance(), "runs": []}
    for processes in (1, args.processes):
        found["runs"] += start(processes, args)
        write_json(args.out, found)
    first = found["runs"][: len(found["runs"]) // 2]
    for alone, many in zip(first, found["runs"][len(first) :], strict=True):
        many |= compared(alone, many)
        print(
            f"{many['size']:4} {many['method']:28} {alone['seconds']:.3f} s, {alone['peak_gib']:.2f} GiB alone; "
            f"{many['seconds']:.3f} s, {many['peak_gib']:.2f} GiB a rank, {many['times_as_fast']:.2f} times as fast, "
            f"losses off by {many['losses_off']:.1e}, parameters equal {many['parameters_equal']}, "
            f"ranks identical {many['ranks_identical']}, {many['sent']}",
            flush=True,
        )
    write_json(args.out, found)


if __name__ == "__main__":
    main()
