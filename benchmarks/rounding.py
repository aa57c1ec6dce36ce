"""What rounding takes off numbers where nothing is trained: figures of the pages on how it works. On a CPU, in seconds.

    python benchmarks/rounding.py --model DIR --out benchmarks/results/rounding.json      # DIR: SmolLM2-135M-Instruct

first_scales    relative error of the first rounding of a float model's weights, |W - W^| / |W|, by bits, range and what
                shares a scale: the mean over `LAYERS`, one of each kind and more, from the first block to the last
signed_scales   how much smaller the squared error is where the sign of a scale may choose the side with one level more:
                rows of 4096 normally distributed weights, `range_method="lp"` with its default
factors         relative error of lora_B lora_A where the factors are rounded to fixed point (`ops/factors.py`), for
                normally distributed factors of a layer of 1024 x 1024
cache           relative error of heads of 128 normally distributed keys at 4 bits, and of their other channels where
                two are ten times as large, by `kv_rule`

Errors are root mean squares.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import provenance, write_json
from safetensors import safe_open

from peft_lrqat import Grid
from peft_lrqat.grid import TERNARY, dequantize, quantize
from peft_lrqat.ops.factors import round_factors
from peft_lrqat.ops.kv_cache import CacheRounding, round_states
from peft_lrqat.ranges import choose_range

LAYERS = [
    f"model.layers.{block}.{name}_proj"
    for block, name in (
        (0, "self_attn.q"),
        (3, "self_attn.k"),
        (6, "self_attn.v"),
        (9, "self_attn.o"),
        (12, "mlp.gate"),
        (15, "mlp.up"),
        (18, "mlp.down"),
        (22, "self_attn.o"),
        (26, "mlp.gate"),
        (29, "mlp.down"),
    )
]
METHODS = ("absmean", "minmax", "lp")
SHARED = {"channel": -1, "tensor": 0}


def off(rounded: torch.Tensor, exact: torch.Tensor) -> float:
    """The relative error."""
    return float((rounded - exact).norm() / exact.norm())


def on_grid(weight: torch.Tensor, grid: Grid, method: str, signed: bool) -> torch.Tensor:
    scale, zero = choose_range(weight, grid, method, signed=signed)
    return dequantize(quantize(weight, scale, zero, grid), scale, zero, torch.float32)


def first_scales(model: Path) -> dict[str, Any]:
    with safe_open(model / "model.safetensors", "pt") as file:
        weights = [file.get_tensor(f"{name}.weight").float() for name in LAYERS]
    found: dict[str, Any] = {}
    for bits in (TERNARY, 2, 3, 4, 8):
        for method in METHODS:
            for shared, group in SHARED.items():
                signed = bits != TERNARY and method != "absmean"  # as the configuration's defaults have it
                errors = [off(on_grid(weight, Grid(bits, group), method, signed), weight) for weight in weights]
                found.setdefault(f"{bits:g} bits", {})[f"{method}, {shared}"] = sum(errors) / len(errors)
    return found


def signed_scales(rows: int) -> dict[str, Any]:
    torch.manual_seed(0)
    weight = torch.randn(rows, 4096)
    found: dict[str, Any] = {}
    for bits in (4, 3, 2):
        for name, group in (("groups of 32", 32), ("groups of 128", 128), ("per channel", -1)):
            one_side, either = (
                off(on_grid(weight, Grid(bits, group), "lp", signed), weight) for signed in (False, True)
            )
            found.setdefault(f"{bits} bits", {})[name] = 1 - (either / one_side) ** 2
    return found


def factors() -> dict[str, float]:
    torch.manual_seed(0)
    found = {}
    for rank in (8, 32, 64, 256):
        A, B = torch.randn(rank, 1024), torch.randn(1024, rank)
        rounded = round_factors(A, B)
        found[f"rank {rank}"] = off(rounded.B.double() @ rounded.A.double(), B.double() @ A.double())
    return found


def cache(tokens: int) -> dict[str, Any]:
    torch.manual_seed(0)
    heads = torch.randn(1, 8, tokens, 128)
    outliers = heads.clone()
    outliers[..., [5, 77]] *= 10
    others = [channel for channel in range(128) if channel not in (5, 77)]
    found = {}
    for rule, group in (("transformers", 128), ("vllm", None)):
        rounding = CacheRounding(4, rule, group)
        found[rule] = {
            "normal": off(round_states(heads, rounding), heads),
            "others": off(round_states(outliers, rounding)[..., others], outliers[..., others]),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder of SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=256, help="of normally distributed weights")
    parser.add_argument("--tokens", type=int, default=1024, help="of normally distributed keys")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result = {
        "layers": LAYERS,
        "first_scales": first_scales(args.model),
        "signed_scales": signed_scales(args.rows),
        "factors": factors(),
        "cache": cache(args.tokens),
    }
    write_json(args.out, {**result, **provenance()})


if __name__ == "__main__":
    main()
