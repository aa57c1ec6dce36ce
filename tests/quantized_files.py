"""Tiny checkpoints in the formats of other tools, by packers of their own, and the float models they stand for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from peft_lrqat import Grid, LRQATConfig
from tests.models import tiny

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Spec:
    """A checkpoint to write."""

    method: str  # "packed", "integers" and "w8a8" (compressed-tensors), "gptq", "gptq_v2", "awq"
    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    dtype: torch.dtype = torch.float16  # of the model
    scale_dtype: torch.dtype | None = None  # of the file's scales

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size, self.symmetric)

    def __str__(self) -> str:
        kind = "" if self.symmetric else "-asym"
        return f"{self.method}-w{self.bits}-g{self.group_size}{kind}-{str(self.dtype)[6:]}"


def write(folder: Path, spec: Spec, other: dict[str, Spec] | None = None, **config: Any) -> PreTrainedModel:
    """Write a checkpoint of random codes that use both ends of the grid; returns the float model of the same values.

    Args:
        other: layers with this in their name are stored so instead.
        config: entries of `quantization_config` to add or change.
    """
    by_default, model = spec, tiny(dtype=spec.dtype, **SIZES)
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            spec = next((s for part, s in (other or {}).items() if part in name), by_default)
            codes, scale, zero = random_layer(linear.weight, spec)
            del state[name + ".weight"]
            state |= {f"{name}.{key}": value for key, value in pack(codes, scale, zero, spec).items()}
            per_weight = torch.Size(codes.shape).numel() // scale.numel() if spec.group_size else codes.numel()
            s, z = (t.repeat_interleave(per_weight).view(codes.shape).float() for t in (scale, zero))
            linear.weight.data = ((codes - z) * s).to(spec.dtype)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {**quantization_config(by_default), **config}
    (folder / "config.json").write_text(json.dumps(described))
    return model


def random_layer(weight: torch.Tensor, spec: Spec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centred int64 codes (out, in), float scales and int64 zero points (rows, groups), in the file's scale dtype."""
    grid, (out, cols) = spec.grid, weight.shape
    generator = torch.Generator().manual_seed(out * cols)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (out, cols), generator=generator)
    codes[:, 0], codes[:, 1] = grid.qmin, grid.qmax
    shape = grid.scale_shape(out, cols)
    # numbers that fp16 holds, and bf16 in general does not
    scale = (0.1 + 0.4 * torch.rand(shape, generator=generator)) / (grid.qmax - grid.qmin)
    scale = scale.to(torch.float16).to(spec.scale_dtype or spec.dtype)
    low = grid.qmin + (spec.method == "gptq")  # version 1 has no zero point at the lower end
    zero = torch.randint(low, grid.qmax + 1, shape, generator=generator)
    if spec.symmetric:  # as Gemma's 4-bit releases have them, and llama.cpp's Q4_0
        scale = torch.where(zero < 0, -scale, scale)
    return codes, scale, zero * (not spec.symmetric)


def pack(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: Spec) -> dict[str, torch.Tensor]:
    """What the format stores for a layer."""
    half, bits = 1 << (spec.bits - 1), spec.bits
    if spec.method in ("packed", "integers", "w8a8"):
        stored = {"weight_scale": scale.view(1) if spec.group_size == 0 else scale}
        if spec.method != "packed":
            stored["weight"] = codes.to(torch.int8)
            if not spec.symmetric:
                stored["weight_zero_point"] = zero.to(torch.int8)
            return stored
        stored["weight_packed"] = pack_to_int32(codes.to(torch.int8), bits)
        stored["weight_shape"] = torch.tensor(codes.shape)
        if not spec.symmetric:
            stored["weight_zero_point"] = pack_to_int32(zero.to(torch.int8), bits, packed_dim=0).contiguous()
        return stored
    if spec.method == "awq":
        return {
            "qweight": stream(codes.t() + half, 4, AWQ_ORDER),
            "qzeros": stream(zero.t() + half, 4, AWQ_ORDER),
            "scales": scale.t().contiguous(),
        }
    less = 1 if spec.method == "gptq" else 0
    per_group = codes.shape[1] // scale.shape[1]
    return {
        "qweight": stream(codes + half, bits).t().contiguous(),
        "qzeros": stream(zero.t() + half - less, bits),
        "scales": scale.t().contiguous(),
        "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // per_group,
    }


def stream(unsigned: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """int32 words of rows of numbers, as one little-endian stream a row; `order`: which of eight neighbours is next."""
    if order is not None:
        unsigned = unsigned.reshape(unsigned.shape[0], -1, 8)[..., order].reshape(unsigned.shape)
    rows = []
    for row in unsigned.tolist():
        whole = sum(value << (bits * i) for i, value in enumerate(row))
        rows.append(np.frombuffer(whole.to_bytes(len(row) * bits // 8, "little"), dtype="<i4"))
    return torch.from_numpy(np.stack(rows).copy())


def quantization_config(spec: Spec) -> dict[str, Any]:
    """What config.json says."""
    if spec.method == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": spec.group_size, "zero_point": True, "version": "gemm"}
    if spec.method.startswith("gptq"):
        return {
            "quant_method": "gptq",
            "bits": spec.bits,
            "group_size": spec.group_size,
            "sym": spec.symmetric,
            "desc_act": False,
            "checkpoint_format": spec.method,
        }
    strategy = {-1: "channel", 0: "tensor"}.get(spec.group_size, "group")
    form = "pack-quantized" if spec.method == "packed" else "int-quantized"
    weights = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": strategy,
        "group_size": spec.group_size if strategy == "group" else None,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights}
    if spec.method == "w8a8":
        group["input_activations"] = {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def adapt(model: nn.Module, **options) -> PeftModel:
    """LR-QAT on all linear layers of a quantized model, on its own grid."""
    settings = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LRQATConfig(**{**settings, **options}))
