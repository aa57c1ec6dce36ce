"""What the benchmarks share: where a figure comes from, and text as tokens."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

#: Shapes of Llama models, by size; the vocabulary is transformers' default, 32,000.
LLAMA: dict[str, dict[str, int]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def provenance() -> dict[str, Any]:
    """Device, versions and commit of a run."""
    packages = (
        "torch",
        "transformers",
        "peft",
        "trl",
        "triton",
        "compressed-tensors",
        "torchao",
        "bitsandbytes",
        "liger-kernel",
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = os.environ.get("BENCH_COMMIT") or subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, {cpu}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def graph_pools(device: str) -> float:
    """GiB that CUDA graphs hold for what they compute, which torch does not count as allocated."""
    if device != "cuda":
        return 0.0
    private = [part for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) != (0, 0)]
    return sum(part["total_size"] - part["allocated_size"] for part in private) / 2**30


def visible_gpu(number: int) -> str:
    """A GPU's name for a process of its own: where this one sees some GPUs only, its number counts those."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[number] if visible else str(number)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write under a temporary name, then move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp") as file:
        json.dump(data, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
