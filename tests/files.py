"""What a saved checkpoint holds, read by nothing of this package."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whatever its shards."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in tensors
                tensors[name] = file.get_tensor(name)
    return tensors


def described(folder: Path) -> dict:
    """The `quantization_config` of config.json."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]
