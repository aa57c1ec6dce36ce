"""Memory and time of loading a model and adapting it: quantized while it is loaded, or in float and converted.

    python benchmarks/loading.py --size 0.3B --stored float32 --out benchmarks/results/loading.json
    python benchmarks/loading.py --size 7B --device cuda --out loading_7b.json     # 13.5 GB on disk

A checkpoint with random weights in Llama's shapes is written in shards, and loaded in bf16. Each way runs in a process
of its own. Memory on the CPU: the peak of the process's anonymous memory, less what it held before loading. Files that
are mapped for reading do not count, and weights that are loaded in the dtype of the file stay mapped; with `--stored
float32` they are converted, and count. On a GPU: the peak of what torch allocated. "stored": what the adapted model
holds.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import LLAMA, provenance, write_json

SIZES: dict[str, dict[str, int]] = {
    "0.3B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20, "num_attention_heads": 16},
    "7B": LLAMA["7B"],
    "70B": {**LLAMA["70B"], "vocab_size": 128256},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "LR-QAT int4, per channel": {"downcast": "int"},
    "LR-QAT fx8, per channel": {},
    "low-bit SR 8 bits": {"bits": 8},
    "low-bit SR 8 bits, base dropped": {"bits": 8, "keep_base": False},
}
WAYS = ("while", "after")


def write_checkpoint(folder: Path, shape: dict[str, int], dtype: str) -> None:
    """Random weights in shards of at most one block, without ever holding the model. All blocks hold the same."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**shape, dtype="bfloat16")
    with torch.device("meta"):
        names = {k: v.shape for k, v in AutoModelForCausalLM.from_config(config).state_dict().items()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    shards: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        shards.setdefault(parts[2] if "layers" in parts else name, []).append(name)
    made: dict[str, torch.Tensor] = {}
    index, total = {}, 0
    for number, members in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for name in members:
            kind = name.partition(".layers.")[2].partition(".")[2] or name  # its name in a block
            if kind not in made:
                made[kind] = torch.randn(names[name]).mul_(0.02).to(getattr(torch, dtype))
        tensors = {name: made[name.partition(".layers.")[2].partition(".")[2] or name] for name in members}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(members, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))


def anonymous_bytes() -> int:
    """What the process holds but for files that are mapped (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status names no RssAnon")


class Peak(threading.Thread):
    """Looks at `anonymous_bytes` every 2 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        gc.collect()
        self.start_bytes = self.peak = anonymous_bytes()
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.002):
            self.peak = max(self.peak, anonymous_bytes())


def measure(folder: Path, name: str, way: str, device: str) -> dict[str, Any]:
    """Load and adapt once."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from peft_lrqat import LowBitSRConfig, LRQATConfig

    kind = LRQATConfig if name.startswith("LR-QAT") else LowBitSRConfig
    # min-max ranges: the search takes its time and no memory above that of one layer
    config = kind(group_size=-1, task_type="CAUSAL_LM", range_method="minmax", **CONFIGS[name])
    options: dict[str, Any] = {"dtype": "bfloat16", "device_map": {"": device}}
    if way == "while":
        options["quantization_config"] = config.for_loading()
    torch.zeros(1, device=device)
    peak = Peak()
    peak.start()
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    loaded = time.perf_counter() - started
    model = get_peft_model(model, config)
    adapted = time.perf_counter() - started
    peak.stopped.set()
    peak.join()
    packed = [getattr(p, "packed", None) for p in model.parameters()]
    stored = sum(p.nbytes for p, inside in zip(model.parameters(), packed, strict=True) if inside is None)
    stored += sum(p.packed.nbytes + p.scale.nbytes for p in model.parameters() if hasattr(p, "packed"))
    result = {"config": name, "way": way, "stored": stored, "seconds_loading": loaded, "seconds": adapted}
    result["peak_cpu"] = peak.peak - peak.start_bytes
    if device != "cpu":
        result["peak_gpu"] = torch.cuda.max_memory_allocated()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="0.3B")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stored", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is to be written and kept")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.folder, *args.one, args.device)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").exists():
            write_checkpoint(folder, SIZES[args.size], args.stored)
        runs = []
        for name in args.only:
            for way in args.ways:
                command = [
                    sys.executable,
                    __file__,
                    "--folder",
                    str(folder),
                    "--device",
                    args.device,
                    "--one",
                    name,
                    way,
                ]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr[-4000:])
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                found = {
                    key: f"{v / 2**20:.0f} MiB" for key, v in runs[-1].items() if key.startswith(("peak", "stored"))
                }
                print(name, way, found, f"{runs[-1]['seconds']:.1f} s", flush=True)
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if args.out:
        write_json(
            args.out,
            {**provenance(), "size": args.size, "stored": args.stored, "checkpoint_bytes": weights, "runs": runs},
        )


if __name__ == "__main__":
    main()
