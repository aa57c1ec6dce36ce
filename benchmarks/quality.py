"""Perplexity after the same number of steps: LR-QAT beside full QAT, LoRA-then-round and plain rounding.

    python benchmarks/quality.py tokens --model DIR --train english.jsonl.gz --eval wikitext2_valid.txt --out tokens/
    python benchmarks/quality.py run --model DIR --tokens tokens/ --method lrqat --bits 4 --group-size -1 --out run.json
    python benchmarks/quality.py table runs/*.json

Every method sees the same batches (same seed), trains for the same number of steps with AdamW under bf16 autocast, with
linear warm-up over 10 % and cosine decay, and is evaluated in the same way: perplexity on windows of 1024 tokens.

    rtn     the float model, and rounded to nearest on several grids
    lrqat   LRQATConfig, adapters and scales; with --gptq N, from integers that GPTQ chose on N training windows
    lsq     full QAT: every weight of the quantized layers is trained through W^ = s clip(round(W / s)), with LSQ's
            scale gradient (arXiv 1902.08153, as LR-QAT's authors use it), fp32 masters; scales in relative units
    lora    PEFT LoRA in float (what the data alone gives), then merged and rounded to several grids
    full    every weight of the same layers in float, then rounded
    lowbit  LowBitSRConfig with LowBitAdamW: integers trained directly
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import provenance, write_json
from torch import nn
from training import Step, batches, schedule, targets

SEQ = 1024  # --seq


# -- text


def make_tokens(args: argparse.Namespace) -> None:
    """Tokenize both texts once; uint16 arrays."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with gzip.open(args.train, "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    ids: list[int] = []
    for start in range(0, len(texts), 256):
        for encoded in tokenizer(texts[start : start + 256])["input_ids"]:
            ids += [*encoded, tokenizer.eos_token_id]
    np.save(out / "train.npy", np.asarray(ids, dtype=np.uint16))
    np.save(out / "eval.npy", np.asarray(tokenizer(Path(args.eval).read_text())["input_ids"], dtype=np.uint16))


@torch.no_grad()
def perplexity(model: nn.Module, tokens: np.ndarray, device: torch.device, size: int = 8) -> float:
    model.eval()
    windows = torch.from_numpy(tokens[: len(tokens) // SEQ * SEQ].astype(np.int64)).view(-1, SEQ)
    total = 0.0
    for rows in windows.split(size):
        rows = rows.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(input_ids=rows, use_cache=False).logits
        total += nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
        ).item()
    model.train()
    return math.exp(total / (windows.shape[0] * (SEQ - 1)))


# -- methods


class _Lsq(torch.autograd.Function):
    """W^ = s clip(round(W / s)) with LSQ's gradients."""

    @staticmethod
    def forward(ctx, weight, scale, grid):
        from peft_lrqat.grid import grouped

        levels = grouped(weight, scale) / scale.unsqueeze(-1)
        q = levels.round().clamp(grid.qmin, grid.qmax)
        ctx.save_for_backward(levels, q)
        ctx.scale_shape, ctx.grid = scale.shape, grid
        return (q * scale.unsqueeze(-1)).view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        levels, q = ctx.saved_tensors
        inside = (levels >= ctx.grid.qmin) & (levels <= ctx.grid.qmax)
        grouped_grad = grad.view_as(q)
        scale_grad = (grouped_grad * torch.where(inside, q - levels, q)).sum(-1)
        return (grouped_grad * inside).view_as(grad), scale_grad, None


class LsqLinear(nn.Module):
    """Full QAT of one linear layer."""

    def __init__(self, linear: nn.Linear, grid, p: float) -> None:
        super().__init__()
        from peft_lrqat.ranges import choose_range

        self.weight, self.bias, self.grid = linear.weight, linear.bias, grid
        scale, _ = choose_range(linear.weight.detach(), grid, "lp", p)
        self.register_buffer("scale0", scale)
        self.shift = nn.Parameter(torch.zeros_like(scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = _Lsq.apply(self.weight, self.scale0 * (1 + self.shift), self.grid)
        return nn.functional.linear(x, weight, self.bias)


def rounded_perplexities(
    model: nn.Module, held_out: np.ndarray, device: torch.device, norms: list[float]
) -> dict[str, float]:
    """Perplexity after rounding the float weights to nearest, for several grids and range norms: "bits/group/p"."""
    from peft_lrqat import Grid
    from peft_lrqat.grid import dequantize, quantize
    from peft_lrqat.ranges import choose_range

    floats = [linear.weight.data for _, _, linear in targets(model)]
    found = {}
    for bits, group_size in ((4, -1), (4, 64), (3, -1), (3, 64)):
        grid = Grid(bits, group_size)
        for p in norms:
            for (_, _, linear), weight in zip(targets(model), floats, strict=True):
                scale, zero = choose_range(weight, grid, "lp", p)
                linear.weight.data = dequantize(quantize(weight, scale, zero, grid), scale, zero, weight.dtype)
            found[f"{bits}/{group_size}/{p:g}"] = perplexity(model, held_out, device)
    return found


def prepare(model: nn.Module, args: argparse.Namespace) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model to train, and its optimizer groups."""
    from peft import LoraConfig, get_peft_model

    from peft_lrqat import Grid, LRQATConfig

    grid = Grid(args.bits, args.group_size, not args.asymmetric)
    model.requires_grad_(False)
    if args.method == "lsq":
        for parent, name, linear in targets(model):
            setattr(parent, name, LsqLinear(linear, grid, args.p))
            linear.weight.requires_grad_(True)
        weights = [p for n, p in model.named_parameters() if p.requires_grad and "shift" not in n]
        shifts = [p for n, p in model.named_parameters() if n.endswith("shift")]
        return model, [{"params": weights, "lr": args.lr}, {"params": shifts, "lr": args.scale_lr}]
    if args.method == "full":
        weights = [linear.weight.requires_grad_(True) for _, _, linear in targets(model)]
        return model, [{"params": weights, "lr": args.lr}]
    if args.method == "lowbit":
        from peft_lrqat import LowBitSRConfig

        config = LowBitSRConfig(
            bits=args.bits,
            group_size=args.group_size,
            range_p=args.p,
            learn_scales=args.scale_lr > 0,
            error_feedback=args.error_feedback,
            keep_base=False,
            seed=args.seed,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        return model, [
            {"params": [p for n, p in named if "lowbitsr_weight" in n], "lr": args.lr},
            {"params": [p for n, p in named if "lowbitsr_weight" not in n], "lr": args.scale_lr},
        ]
    common = {"r": args.rank, "lora_alpha": round(args.c * args.rank), "target_modules": "all-linear"}
    if args.method == "lora":
        model = get_peft_model(model, LoraConfig(**common, task_type="CAUSAL_LM"))
        return model, [{"params": [p for p in model.parameters() if p.requires_grad], "lr": args.lr}]
    config = LRQATConfig(
        **common,
        bits=args.bits,
        group_size=args.group_size,
        symmetric=not args.asymmetric,
        downcast=args.downcast,
        range_p=args.p,
        init_lora_weights="loftq" if args.loftq else True,
        learn_scales=args.scale_lr > 0,
        task_type="CAUSAL_LM",
    )
    if args.gptq:
        from peft_lrqat import preprocess_gptq

        windows = batches(np.load(Path(args.tokens) / "train.npy"), args.gptq, 1, args.seed + 1, SEQ)
        preprocess_gptq(model.eval(), config, windows, progressbar=False)
    model = get_peft_model(model, config)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if args.bf16_adapters:  # what autocast_adapter_dtype=False gives on a bf16 model; Adam's states follow
        for _, parameter in named:
            parameter.data = parameter.data.bfloat16()
    return model, [
        {"params": [p for n, p in named if "scale_shift" not in n], "lr": args.lr},
        {"params": [p for n, p in named if "scale_shift" in n], "lr": args.scale_lr},
    ]


def run(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    extra = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **extra).to(device)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # GGUF: it is float now
    folder = Path(args.tokens)
    train, held_out = np.load(folder / "train.npy"), np.load(folder / "eval.npy")
    if args.eval_windows:
        held_out = held_out[: args.eval_windows * SEQ]

    result: dict[str, Any] = {**vars(args), **provenance()}
    result.pop("run", None)
    if args.method == "rtn":
        result["perplexity"] = perplexity(model, held_out, device)
        result["rounded"] = rounded_perplexities(model, held_out, device, args.norms)
        finish(result, args.out)
        return
    started = time.perf_counter()
    model, groups = prepare(model, args)
    result["start_seconds"] = time.perf_counter() - started
    model.train()
    if args.method in ("lrqat", "lowbit"):
        result["step0"] = perplexity(model, held_out, device)
    losses: list[torch.Tensor] = []
    groups = [g for g in groups if g["params"]]
    optimizer: torch.optim.Optimizer
    if args.method == "lowbit":
        from peft_lrqat import LowBitAdamW

        optimizer = LowBitAdamW(groups, betas=(0.9, 0.98), compile=device.type == "cuda")
    else:
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, args.steps))
    trained = [p for g in groups for p in g["params"]]
    step = Step(model, trained, (args.batch, SEQ), graph=device.type == "cuda" and not args.no_graph)
    started = time.perf_counter()
    for rows in batches(train, args.steps, args.batch, args.seed, SEQ):
        losses.append(step(rows))
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
    result["train_loss"] = torch.stack(losses)[-20:].mean().item()
    result["seconds"] = time.perf_counter() - started
    result["perplexity"] = perplexity(model, held_out, device)
    write_json(Path(args.out), result)  # choosing ranges takes its time
    if args.method == "full":
        result["rounded"] = rounded_perplexities(model, held_out, device, args.norms)
    if args.method == "lora":
        result["rounded"] = rounded_perplexities(model.merge_and_unload(), held_out, device, args.norms)
    if args.method in ("lrqat", "lowbit"):
        result["merged"] = perplexity(model.merge_and_unload(), held_out, device)
    finish(result, args.out)


def finish(result: dict[str, Any], out: str) -> None:
    write_json(Path(out), result)
    shown = ("perplexity", "step0", "start_seconds", "merged", "rounded", "seconds")
    print(Path(out).stem, {k: result[k] for k in shown if k in result}, flush=True)


def table(args: argparse.Namespace) -> None:
    """Print runs as a Markdown table."""
    runs = []
    for path in args.runs:
        data = json.loads(Path(path).read_text())
        runs += data.get("runs", [data])
    runs.sort(key=lambda r: (r["bits"], r["group_size"], r["method"], r["perplexity"]))
    print("| bits | groups | method | lr | c | p | steps | perplexity |\n|---|---|---|---|---|---|---|---|")
    for r in runs:
        print(
            f"| {r['bits']} | {r['group_size']} | {r['method']} | {r['lr']:g} | {r['c']:g} | {r['p']:g} | {r['steps']} "
            f"| {r['perplexity']:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    tokens = commands.add_parser("tokens")
    tokens.set_defaults(do=make_tokens)
    for name in ("--model", "--train", "--eval", "--out"):
        tokens.add_argument(name, required=True)
    one = commands.add_parser("run")
    one.set_defaults(do=run)
    one.add_argument("--model", required=True)
    one.add_argument("--gguf-file")
    one.add_argument("--tokens", required=True)
    one.add_argument("--out", required=True)
    one.add_argument("--method", choices=("rtn", "lrqat", "lsq", "lora", "full", "lowbit"), required=True)
    one.add_argument("--bits", type=lambda text: float(text) if "." in text else int(text), default=4)
    one.add_argument("--error-feedback", action="store_true", help="lowbit: keep the rounding remainder")
    one.add_argument("--group-size", type=int, default=-1)
    one.add_argument("--asymmetric", action="store_true")
    one.add_argument("--downcast", default=None)
    one.add_argument("--loftq", action="store_true")
    one.add_argument("--rank", type=int, default=32)
    one.add_argument("--c", type=float, default=1.0, help="lora_alpha / r")
    one.add_argument("--p", type=float, default=4.0)
    one.add_argument(
        "--norms", type=float, nargs="+", default=[2.4, 4.0], help="rtn, lora, full: range norms to round with"
    )
    one.add_argument("--lr", type=float, default=1e-3)
    one.add_argument("--scale-lr", type=float, default=1e-3)
    one.add_argument("--steps", type=int, default=300)
    one.add_argument("--batch", type=int, default=8)
    one.add_argument("--gptq", type=int, default=0, help="lrqat: windows of text for GPTQ; 0: the ranges of --p")
    one.add_argument("--bf16-adapters", action="store_true", help="lrqat: adapters and their Adam states in bf16")
    one.add_argument("--seq", type=int, default=SEQ, help="tokens a window")
    one.add_argument("--eval-windows", type=int, help="only the first of the held-out text")
    one.add_argument("--no-graph", action="store_true", help="on a GPU: run every step eagerly")
    one.add_argument("--seed", type=int, default=0)
    shown = commands.add_parser("table")
    shown.set_defaults(do=table)
    shown.add_argument("runs", nargs="+")
    args = parser.parse_args()
    globals()["SEQ"] = getattr(args, "seq", SEQ)
    do = args.do
    del args.do
    do(args)


if __name__ == "__main__":
    main()
