"""The same training twice on a GPU, with this package's kernels and with plain PyTorch: do the losses coincide?

    python benchmarks/paths.py --model DIR --tokens bench/tokens.npz --out paths.json     # LR-QAT and low-bit SR

The tokens are those of accuracy.py. A third run, plain PyTorch with every batch in two halves, shows what a harmless
change of rounding does to these losses: the difference between the paths should be no larger. Codes are compared at
the end.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import provenance, write_json
from training import SEQ, Step, batches

PATHS = ("kernels", "plain", "plain, halves")


def adapted(method: str, args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from peft_lrqat import LowBitSRConfig, LRQATConfig

    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "group_size": args.group_size}
    if method == "lrqat":
        return get_peft_model(model, LRQATConfig(bits=args.bits, r=32, **common))
    return get_peft_model(model, LowBitSRConfig(bits=8, keep_base=False, **common))


def train(model: torch.nn.Module, method: str, tokens: np.ndarray, parts: int, args: argparse.Namespace) -> list[float]:
    """The losses of all steps, each batch in so many parts."""
    from peft_lrqat import LowBitAdamW

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if method == "lrqat":
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=trained[0].is_cuda)
    else:
        optimizer = LowBitAdamW(trained, lr=3e-5, weight_decay=0.0)
    model.train()
    step = Step(model, trained, (args.batch, SEQ), graph=trained[0].is_cuda, parts=parts)
    losses = []
    for rows in batches(tokens, args.steps, args.batch, args.seed):
        losses.append(step(rows))
        optimizer.step()
    return torch.stack(losses).tolist()


def codes(model: torch.nn.Module) -> list[torch.Tensor]:
    return [layer.codes.cpu() for layer in model.merge_and_unload().modules() if hasattr(layer, "weight_packed")]


def main() -> None:
    from peft_lrqat.ops import use_kernels

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--tokens", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--methods", nargs="+", default=["lrqat", "lowbit"], choices=("lrqat", "lowbit"))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with np.load(args.tokens) as file:
        tokens = file["train"]
    runs = []
    for method in args.methods:
        losses, ends = {}, {}
        start = adapted(method, args, device)
        for path in PATHS:
            with contextlib.nullcontext() if path == "kernels" else use_kernels(False):
                model = copy.deepcopy(start)
                losses[path] = train(model, method, tokens, 2 if path.endswith("halves") else 1, args)
                ends[path] = codes(model)
            del model
        run: dict[str, Any] = {"method": method, "losses": losses}
        for path in ("kernels", "plain, halves"):
            gaps = [abs(a - b) for a, b in zip(losses[path], losses["plain"], strict=True)]
            other = sum(int((a != b).sum()) for a, b in zip(ends[path], ends["plain"], strict=True))
            count = sum(a.numel() for a in ends["plain"])
            run[path] = {"largest_gap": max(gaps), "first_gap": gaps[0], "other_codes": other / count}
            print(
                f"{method}: {path} beside plain: losses differ by at most {max(gaps):.2e} of {losses['plain'][-1]:.3f} "
                f"(step 1: {gaps[0]:.1e}), {100 * other / count:.3f} % of the codes at the end",
                flush=True,
            )
        runs.append(run)
        options = {k: v for k, v in vars(args).items() if k not in ("model", "tokens", "out")}
        write_json(Path(args.out), {**provenance(), **options, "runs": runs})


if __name__ == "__main__":
    main()
