"""What `preprocess_rotation` does to a float model: its own outputs, and what rounding activations then costs.

    python benchmarks/rotation.py --model DIR --text wikitext2_valid.txt --out benchmarks/results/rotation.json

Inputs of the linear layers of the blocks are rounded per token, values per token and head, dynamic and symmetric as
compressed-tensors does it (the largest magnitude takes 7.5 steps of 4 bits); or weights, to nearest, in groups of 64.
Perplexity of the first windows of a text, and KL to the fp32 model that was not rotated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accuracy_methods import complete, round_model
from common import provenance, write_json
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_lrqat import preprocess_rotation

#: Name -> bits of a layer's input by the layer's last name ("": all others), of the values, of the weights.
SETTINGS: dict[str, dict[str, int]] = {
    "float": {},
    "A8": {"": 8},
    "A4, down_proj's 8": {"": 4, "down_proj": 8},
    "A4": {"": 4},
    "values 4": {"values": 4},
    "W4": {"weights": 4},  # the last: it stays
}


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row of (..., n) on its own grid."""
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / (2 ** (bits - 1) - 0.5)
    return (x / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step


def hook_up(model: nn.Module, bits: dict[str, int]) -> list[Any]:
    """Round inputs and values from now on; returns the handles."""

    def before(width: int) -> Callable:
        return lambda _, args: (rounded(args[0], width), *args[1:])

    handles: list[Any] = []
    if width := bits.get("weights"):
        round_model(model, complete({"method": "round", "bits": width}))
        return handles
    for name, module in model.model.layers.named_modules():  # type: ignore[union-attr, operator]  # a decoder's blocks
        last = name.rpartition(".")[2]
        if not isinstance(module, nn.Linear):
            continue
        if width := bits.get(last, bits.get("")):
            handles.append(module.register_forward_pre_hook(before(width)))
        if last == "v_proj" and (width := bits.get("values")):
            size = model.model.layers[0].self_attn.head_dim  # type: ignore[union-attr, index]

            def after(_: nn.Module, args: Any, y: torch.Tensor, width: int = width, size: int = size) -> torch.Tensor:
                return rounded(y.unflatten(-1, (-1, size)), width).flatten(-2)

            handles.append(module.register_forward_hook(after))
    return handles


@torch.no_grad()
def measure(model: nn.Module, windows: torch.Tensor, teacher: list[torch.Tensor] | None) -> tuple[dict, list]:
    """Perplexity, and KL to the log-probabilities of `teacher`; the model's own."""
    loss = kl = 0.0
    found = []
    for index, row in enumerate(windows):
        logp = model(input_ids=row[None]).logits[0, :-1].float().log_softmax(-1)
        loss -= logp.gather(1, row[1:, None]).mean().item() / len(windows)
        if teacher is None:
            found.append(logp)
        else:
            kl += (teacher[index].exp() * (teacher[index] - logp)).sum(-1).mean().item() / len(windows)
    return {"ppl": float(torch.tensor(loss).exp()), "kl": kl}, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=2, help="rotations")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(Path(args.text).read_text(encoding="utf-8")[: 20 * args.windows * args.seq])["input_ids"]
    windows = torch.tensor(ids[: args.windows * args.seq]).view(args.windows, args.seq).to(device)
    rows: list[dict[str, Any]] = []
    teacher = None
    for seed in (None, *range(args.seeds)):
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
            began = time.perf_counter()
            if seed is not None:
                preprocess_rotation(model, seed=seed, progressbar=False)
            seconds = time.perf_counter() - began
            for name, bits in SETTINGS.items() if dtype is torch.float32 else [("float", {})]:
                handles = hook_up(model, bits)
                found, logp = measure(model, windows, teacher)
                teacher = teacher or logp
                for handle in handles:
                    handle.remove()
                rows.append({"rotation": seed, "dtype": str(dtype), "setting": name, "seconds": seconds, **found})
                print(f"{seed!s:>5} {dtype!s:>14} {name:<18} ppl {found['ppl']:8.3f}  kl {found['kl']:.2e}", flush=True)
    about = {"model": Path(args.model).name, "windows": args.windows, "seq": args.seq}
    write_json(Path(args.out), {**about, **provenance(), "rows": rows})


if __name__ == "__main__":
    main()
