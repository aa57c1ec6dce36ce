"""From scratch: full precision, BitNet b1.58 and low-bit SR on one LLaMA-structured model, on the same batches.

    python benchmarks/pretrain.py tokens --model DIR --train english.jsonl.gz --eval text.txt --out tokens/
    python benchmarks/pretrain.py run --tokens tokens/ --out pretrain.json float bitnet dqt-8 ours-8 "ours-1.58:lr=0.3"
    python benchmarks/pretrain.py table pretrain.json
    python benchmarks/pretrain.py plot pretrain.json --out pretrain.png

Several methods run one after the other in one process; the JSON is written anew after each. A method is one of PRESETS,
with options after a colon: `lr`, `float_lr`, fields of LowBitSRConfig, or arguments of LowBitAdamW.

Everything but the linear layers of the blocks (embedding, tied output layer, norms) is trained in fp32 by every method,
as BitNet does; DQT's own code puts those on the grid as well. All of it runs under bf16 autocast. Held-out text: every
twentieth document of the training collection ("eval"), and another text ("other").
"""

from __future__ import annotations

import argparse
import ast
import copy
import gzip
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import provenance, write_json
from torch import nn
from training import Step, loss_of, targets

_OURS = {"error_feedback": True, "state": "8bit", "betas": (0.9, 0.98)}
_PUBLISHED = {  # DQT: one scale per tensor that clips at the mean magnitude, fp32 AdamW state, 8-bit activations
    "range_method": "absmean", "group_size": 0, "act_bits": 8, "state": "fp32", "betas": (0.9, 0.999),
    "weight_decay": 0.01, "lr": 5e-4, "float_lr": 5e-4,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "float": {"kind": "float", "lr": 1e-3},
    "bitnet": {"kind": "bitnet", "lr": 1e-3, "act_bits": 8},
    **{f"dqt-{bits:g}": {"kind": "low-bit", "bits": bits, **_PUBLISHED} for bits in (1.58, 3, 4, 8)},
    **{f"ours-{bits}": {"kind": "low-bit", "bits": bits, "range_method": "minmax", **_OURS} for bits in (3, 4, 8)},
    "ours-1.58": {"kind": "low-bit", "bits": 1.58, "learn_scales": True, **_OURS},
    "ternary-inference": {"kind": "low-bit", "bits": 8, "forward_bits": 1.58, "range_method": "minmax", **_OURS},
}
_OPTIMIZER = ("betas", "eps", "weight_decay", "state", "lr_unit")
_COMMON = {"lr": 1e-3, "float_lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 0.0}


def parse_method(text: str) -> dict[str, Any]:
    """`name:key=value,...` as a dictionary of options, on top of the preset's."""
    name, _, rest = text.partition(":")
    if name not in PRESETS:
        raise SystemExit(f"{name!r} is none of {', '.join(PRESETS)}")
    options = {**_COMMON, **PRESETS[name], "method": text}
    for part in filter(None, rest.split(";" if ";" in rest else ",")):
        key, _, value = part.partition("=")
        try:
            options[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key.strip()] = value
    return options


# -- text


def make_tokens(args: argparse.Namespace) -> None:
    """uint16 arrays: train.npy, eval.npy (every twentieth document), other.npy."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with gzip.open(args.train, "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    parts: dict[str, list[int]] = {"train": [], "eval": []}
    for start in range(0, len(texts), 256):
        for offset, ids in enumerate(tokenizer(texts[start : start + 256])["input_ids"]):
            parts["eval" if (start + offset) % 20 == 0 else "train"] += [*ids, tokenizer.eos_token_id]
    for name, ids in parts.items():
        np.save(out / f"{name}.npy", np.asarray(ids, dtype=np.uint16))
    if args.eval:
        np.save(out / "other.npy", np.asarray(tokenizer(Path(args.eval).read_text())["input_ids"], dtype=np.uint16))
    print({name: len(ids) for name, ids in parts.items()})


def batches(tokens: torch.Tensor, steps: int, size: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """`steps` batches (size, length) from random places, gathered on the tokens' device; the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length, (steps, size, 1), generator=generator)
    if tokens.is_cuda:
        starts = starts.pin_memory().to(tokens.device, non_blocking=True)
    offsets = torch.arange(length, device=tokens.device)
    for start in starts:
        yield tokens[start + offsets].long()


# -- models


class BitLinear(nn.Module):
    """BitNet b1.58 (arXiv 2402.17764): ternary weight and 8-bit activations, straight-through, fp32 master."""

    def __init__(self, linear: nn.Linear, act_bits: int | None) -> None:
        super().__init__()
        self.weight, self.act_bits = linear.weight, act_bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from peft_lrqat.ops.activations import Activations, round_activations

        with torch.autocast(x.device.type, enabled=False):
            scale = self.weight.abs().mean().clamp(min=1e-5)
            rounded = (self.weight / scale).round().clamp(-1, 1) * scale
            weight = self.weight + (rounded - self.weight).detach()
        x = x if self.act_bits is None else round_activations(x, Activations("bitnet", self.act_bits))
        return nn.functional.linear(x, weight)


def float_model(args: argparse.Namespace, vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // args.head_dim,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
    )
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(config)


def prepare(
    model: nn.Module, options: dict[str, Any], device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer, list[tuple[torch.Tensor, float]]]:
    """The model to train, its optimizer, and its learning rates: (0-dim tensor on the device, peak value)."""
    linears = {id(linear.weight) for _, _, linear in targets(model)}
    if options["kind"] == "low-bit":
        from dataclasses import fields

        from peft import get_peft_model

        from peft_lrqat import LowBitAdamW, LowBitSRConfig

        known = {field.name for field in fields(LowBitSRConfig)}
        config = {key: value for key, value in options.items() if key in known}
        model = get_peft_model(
            model.to(device), LowBitSRConfig(**{"keep_base": False, **config}, target_modules="all-linear")
        )
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and "lowbitsr_" not in name:
                parameter.requires_grad_(True)
        held = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        coded = [p for n, p in held if "lowbitsr_weight" in n]
        others = [p for n, p in held if "lowbitsr_weight" not in n]
    else:
        if options["kind"] == "bitnet":
            for parent, name, linear in targets(model):
                setattr(parent, name, BitLinear(linear, options["act_bits"]))
        model.to(device)
        coded = [p for p in model.parameters() if id(p) in linears]
        others = [p for p in model.parameters() if id(p) not in linears]
    rates = [(torch.tensor(0.0, device=device), options["lr"]), (torch.tensor(0.0, device=device), options["float_lr"])]
    groups = [{"params": coded, "lr": rates[0][0]}, {"params": others, "lr": rates[1][0], "weight_decay": 0.0}]
    if options["kind"] == "low-bit":
        chosen = {key: options[key] for key in _OPTIMIZER if key in options}
        return model, LowBitAdamW(groups, compile=device.type == "cuda", **chosen), rates
    chosen = {key: options[key] for key in ("betas", "weight_decay")}
    return model, torch.optim.AdamW(groups, fused=True, **chosen), rates


# -- a run


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: torch.Tensor, size: int) -> torch.Tensor:
    """Mean next-token loss over windows (n, length); stays on the device."""
    model.eval()
    losses = [loss_of(model, rows.long()) * rows.shape[0] for rows in windows.split(size)]
    model.train()
    return torch.stack(losses).sum() / windows.shape[0]


def watched(model: nn.Module) -> Any:
    """A low-bit weight from the middle of the model, or None."""
    from peft_lrqat.tuners.lowbit_sr import LowBitTensor

    found = [p for p in model.parameters() if isinstance(p, LowBitTensor)]
    return found[len(found) // 2] if found else None


def run_one(model: nn.Module, options: dict[str, Any], data: dict, args: argparse.Namespace) -> dict[str, Any]:
    device = data["train"].device
    cuda = device.type == "cuda"
    torch._dynamo.reset()  # or the kernels of many methods count as recompilations of one
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model, optimizer, rates = prepare(model, options, device)
    model.train()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    step = Step(model, trained, (args.batch, args.length), graph=cuda and not args.no_graph)
    warm, every = max(1, round(args.steps * args.warmup)), max(1, args.steps // args.evaluations)
    curve: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []
    losses: list[torch.Tensor] = []
    weight = watched(model)
    started = evaluating = 0.0
    untimed = min(5, args.steps - 1)  # they compile kernels and capture the graph
    stream = batches(data["train"], args.steps, args.batch, args.length, args.seed)
    for number, rows in enumerate(stream, start=1):
        part = number / warm if number <= warm else None
        if part is None:
            part = 0.5 * (1 + math.cos(math.pi * (number - warm) / max(1, args.steps - warm)))
        for tensor, peak in rates:
            tensor.fill_(peak * part)
        if number == untimed + 1:
            if cuda:
                torch.cuda.synchronize()
            started, evaluating = time.perf_counter(), 0.0
        losses.append(step(rows))
        nn.utils.clip_grad_norm_(trained, 1.0)
        look = number % every == 0 or number == args.steps
        before = weight.codes() if look and weight is not None else None
        optimizer.step()
        if look:
            flipped = None if before is None else (weight.codes() != before).float().mean()
            if cuda:
                torch.cuda.synchronize()
            paused = time.perf_counter()
            curve.append((number, held_out_loss(model, data["eval"], args.batch), flipped))
            if cuda:
                torch.cuda.synchronize()
            evaluating += time.perf_counter() - paused
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started - evaluating
    result = {
        **{key: value for key, value in options.items() if key != "act_bits" or value},
        "curve": [[n, loss.item(), None if flip is None else flip.item()] for n, loss, flip in curve],
        "loss": curve[-1][1].item(),
        "train_loss": torch.stack(losses)[-max(1, args.steps // 50) :].mean().item(),
        "other_loss": held_out_loss(model, data["other"], args.batch).item() if "other" in data else None,
        "seconds_per_step": seconds / (args.steps - untimed),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "linear_weights": sum(p.numel() for p in optimizer.param_groups[0]["params"]),
    }
    print(
        f"{options['method']}: loss {result['loss']:.4f}, {1e3 * result['seconds_per_step']:.1f} ms a step", flush=True
    )
    return result


def run(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(args.tokens)
    arrays = {path.stem: torch.from_numpy(np.load(path).astype(np.int32)) for path in folder.glob("*.npy")}
    data: dict[str, torch.Tensor] = {"train": arrays["train"].to(device)}
    for name in set(arrays) - {"train"}:
        kept = arrays[name][: min(len(arrays[name]), args.eval_tokens) // args.length * args.length]
        data[name] = kept.view(-1, args.length).to(device)
    start = float_model(args, args.vocabulary)
    settings = {key: value for key, value in vars(args).items() if key not in ("methods", "tokens", "out")}
    report: dict[str, Any] = {**provenance(), **settings, "tokens_seen": args.steps * args.batch * args.length}
    runs: list[dict[str, Any]] = []
    for text in args.methods:
        runs.append(run_one(copy.deepcopy(start), parse_method(text), data, args))
        write_json(Path(args.out), {**report, "runs": runs})


# -- results


def read(paths: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    reports = [json.loads(Path(path).read_text()) for path in paths]
    return reports[0], [one for report in reports for one in report["runs"]]


def table(args: argparse.Namespace) -> None:
    """Markdown; differences are from the full-precision and the BitNet run among the files, if they are there."""
    _, runs = read(args.runs)
    known = {one["kind"]: one["loss"] for one in reversed(runs)}

    def beside(loss: float, kind: str) -> str:
        return f"{100 * (loss / known[kind] - 1):+.1f} %" if kind in known else ""

    print(
        "| method | held-out loss | to float | to BitNet | training loss | other text | codes changed a step "
        "| peak GiB | ms a step |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for one in runs:
        flips = [flip for _, _, flip in one["curve"] if flip is not None]
        other = "" if one["other_loss"] is None else f"{one['other_loss']:.4f}"
        peak = "" if one["peak_gib"] is None else f"{one['peak_gib']:.2f}"
        changed = f"{100 * max(flips):.2g} %" if flips else ""
        print(
            f"| {one['method']} | {one['loss']:.4f} | {beside(one['loss'], 'float')} | {beside(one['loss'], 'bitnet')} "
            f"| {one['train_loss']:.3f} | {other} | {changed} | {peak} | {1e3 * one['seconds_per_step']:.1f} |"
        )


def plot(args: argparse.Namespace) -> None:
    """Held-out loss against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    report, runs = read(args.runs)
    figure, axes = plt.subplots(figsize=(9, 5))
    shades = {bits: f"C{number}" for number, bits in enumerate(sorted({one.get("bits", 0) for one in runs}))}
    for one in runs:
        steps, losses, _ = zip(*one["curve"], strict=True)
        axes.plot(
            steps,
            losses,
            {"float": "-", "bitnet": "--"}.get(one["kind"], ":" if one["method"].startswith("dqt") else "-"),
            color=shades[one["bits"]] if "bits" in one else "black",
            linewidth=0.8 if ":" in one["method"] else 1.6,  # a preset with changed options
            label=f"{one['method']}  {losses[-1]:.3f}",
        )
    axes.set_xlabel(f"steps of {report['batch'] * report['length']} tokens")
    axes.set_ylabel("held-out loss, nats a token")
    lowest = min(min(point[1] for point in one["curve"]) for one in runs)
    axes.set_ylim(lowest - 0.05, lowest + 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(args.out, dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    tokens = commands.add_parser("tokens")
    tokens.set_defaults(do=make_tokens)
    tokens.add_argument("--model", required=True, help="whose tokenizer")
    tokens.add_argument("--train", required=True, help=".jsonl.gz with a text column")
    tokens.add_argument("--eval", help="another text")
    tokens.add_argument("--out", required=True)
    one = commands.add_parser("run")
    one.set_defaults(do=run)
    one.add_argument("methods", nargs="+", help=", ".join(PRESETS))
    one.add_argument("--tokens", required=True)
    one.add_argument("--out", required=True)
    add = one.add_argument
    add("--vocabulary", type=int, default=49152)
    add("--hidden", type=int, default=384)
    add("--intermediate", type=int, default=1024)
    add("--layers", type=int, default=8)
    add("--head-dim", type=int, default=64)
    add("--length", type=int, default=512)
    add("--batch", type=int, default=64)
    add("--steps", type=int, default=1900, help="of batch * length tokens: 62 M with the defaults")
    add("--warmup", type=float, default=0.05, help="share of the steps; cosine to zero after it")
    add("--evaluations", type=int, default=20)
    add("--eval-tokens", type=int, default=1 << 18)
    add("--no-graph", action="store_true", help="on a GPU: run every step eagerly")
    add("--seed", type=int, default=0)
    shown = commands.add_parser("table")
    shown.set_defaults(do=table)
    drawn = commands.add_parser("plot")
    drawn.set_defaults(do=plot)
    drawn.add_argument("--out", required=True)
    for command in (shown, drawn):
        command.add_argument("runs", nargs="+")
    args = parser.parse_args(argv)
    do = args.do
    del args.do
    do(args)


if __name__ == "__main__":
    main()
