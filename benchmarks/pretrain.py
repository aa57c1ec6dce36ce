"""From scratch: full precision, BitNet b1.58 and low-bit SR on one LLaMA-structured model, on the same batches.

    python benchmarks/text.py --set pretrain --out text/
    python benchmarks/pretrain.py tokens --model DIR --text text/ --out tokens/
    python benchmarks/pretrain.py run --tokens tokens/ --out pretrain.json --seeds 0 1 -- float bitnet ours-8
    python benchmarks/pretrain.py run --tokens tokens/ --out 1B.json --shape 1B --batch 8 --steps 30 float bitnet ours-8
    python benchmarks/pretrain.py run --tokens tokens/ --out all.json --per-gpu 5 --limit 500 -- float bitnet ours-8
    python benchmarks/pretrain.py table pretrain.json
    python benchmarks/pretrain.py plot pretrain.json --out pretrain.png

The training text is cut into windows, and each is seen once, in an order that the seed decides: steps that would need
a second pass are refused, unless `--passes` allows it. Held out are documents that the training text has not, and
WikiText-2 ("other").

Each run (a method with a seed) is a process of its own, on all GPUs, `--per-gpu` of them at a time on each; those that
share a GPU have no step times. All methods run with the first seed, then with the next. The JSON is written anew
whenever a run has evaluated; after `--limit` seconds what runs is dropped, with its curve kept. The same call again
takes what is finished in `--out` as it is, and starts the rest. A method is one of PRESETS, with options after a colon:

    lr, float_lr    peak learning rates of the linear layers' weights, and of everything else
    floor           share of the peak at which the cosine of `lr` ends; 0 without it
    init            "normal", N(0, 0.02), or "linear", nn.Linear's own uniform one: of the linear layers
    act_bits        8: their inputs are rounded. `--act-bits` 8 or 0 says it for all methods of a comparison
    and fields of LowBitSRConfig, and arguments of LowBitAdamW

Everything but the linear layers of the blocks (embedding, tied output layer, norms) is trained in fp32 by every method,
as BitNet does; DQT's own code puts those on the grid as well. All of it runs under bf16 autocast. Activations are
rounded by BitNet's rule (127 steps for a token's largest magnitude), but in low-bit SR by that of the checkpoint it
would write (compressed-tensors: 127.5).
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import LLAMA, provenance, visible_gpu, write_json
from torch import nn
from training import Step, loss_of, targets

_OURS = {"error_feedback": True, "state": "8bit", "betas": (0.9, 0.98)}
_PUBLISHED = {  # DQT: one scale per tensor that clips at the mean magnitude, fp32 AdamW state, 8-bit activations
    "range_method": "absmean", "group_size": 0, "act_bits": 8, "state": "fp32", "betas": (0.9, 0.999),
    "error_feedback": False, "latent_weights": False, "weight_decay": 0.01, "lr": 5e-4, "float_lr": 5e-4,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "float": {"kind": "float", "lr": 1e-3},
    "bitnet": {"kind": "bitnet", "lr": 1e-3, "act_bits": 8},
    **{f"dqt-{bits:g}": {"kind": "low-bit", "bits": bits, **_PUBLISHED} for bits in (1.58, 3, 4, 8)},
    **{f"ours-{bits}": {"kind": "low-bit", "bits": bits, "range_method": "minmax", **_OURS} for bits in (3, 4, 8)},
    "ours-1.58": {"kind": "low-bit", "bits": 1.58, "learn_scales": True, **_OURS, "latent_weights": False},
    "ours-1.58-latent": {"kind": "low-bit", "bits": 1.58, **_OURS, "state": "factored", "latent_weights": True},
    **{
        f"ternary-inference{name}": {
            "kind": "low-bit",
            "bits": bits,
            "forward_bits": 1.58,
            "range_method": "minmax",
            **_OURS,
        }
        for bits, name in ((8, ""), (4, "-4"))
    },
}
_OPTIMIZER = ("betas", "eps", "weight_decay", "state", "lr_unit", "latent_weights", "fused_backward")
_COMMON = {
    "lr": 1e-3, "float_lr": 1e-3, "floor": 0.0, "betas": (0.9, 0.98), "weight_decay": 0.0, "init": "normal",
    "act_bits": None,
}  # fmt: skip


def parse_method(text: str, act_bits: int | None = None) -> dict[str, Any]:
    """`name:key=value,...` as a dictionary of options, on top of the preset's and of `--act-bits` (0: none)."""
    name, _, rest = text.partition(":")
    if name not in PRESETS:
        raise SystemExit(f"{name!r} is none of {', '.join(PRESETS)}")
    options = {**_COMMON, **PRESETS[name], "method": text}
    if act_bits is not None:
        options["act_bits"] = act_bits or None
    for part in filter(None, re.split(r",(?![^(]*\))", rest)):  # commas, but those of a tuple
        key, _, value = part.partition("=")
        try:
            options[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key.strip()] = value
    if options["init"] not in ("normal", "linear") or options["act_bits"] not in (None, 8):
        raise SystemExit(f"{text!r}: `init` is 'normal' or 'linear', `act_bits` 8 or None")
    return options


# -- text


PART = 30 << 20  # tokens of two bytes in a file


def make_tokens(args: argparse.Namespace) -> None:
    """uint16 arrays, compressed: train-0.npz, train-1.npz ..., held-out.npz, other.npz."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    out, text = Path(args.out), Path(args.text)
    out.mkdir(parents=True, exist_ok=True)

    def ids(texts: list[str]) -> np.ndarray:
        found = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return np.concatenate([np.asarray([*one, tokenizer.eos_token_id], dtype=np.uint16) for one in found])

    for name in ("train", "held-out"):
        with open(text / f"{name}.jsonl", encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        if name == "train" and args.train_tokens:
            texts = some_of(texts, args.train_tokens)
        tokens = np.concatenate([ids(texts[start : start + 64]) for start in range(0, len(texts), 64)])
        parts = [tokens[start : start + PART] for start in range(0, len(tokens), PART)]
        for number, part in enumerate(parts):
            np.savez_compressed(out / (f"{name}-{number}.npz" if name == "train" else f"{name}.npz"), tokens=part)
        print(f"{name}: {len(texts):,} documents, {len(tokens):,} tokens, {len(parts)} files", flush=True)
    np.savez_compressed(out / "other.npz", tokens=ids([(text / "wikitext2.txt").read_text(encoding="utf-8")]))


def some_of(texts: list[str], tokens: int) -> list[str]:
    """Documents in a random order, always the same, with about so many tokens: four characters each."""
    order = np.random.default_rng(0).permutation(len(texts))
    lengths = np.cumsum([len(texts[number]) for number in order])
    return [texts[number] for number in order[: int(np.searchsorted(lengths, 4 * tokens)) + 1]]


def read_tokens(folder: Path) -> dict[str, np.ndarray]:
    """ "train", "held-out" and "other": uint16."""
    found: dict[str, list[np.ndarray]] = {}
    for path in sorted(folder.glob("*.npz")):
        found.setdefault("train" if path.stem.startswith("train-") else path.stem, []).append(np.load(path)["tokens"])
    if not {"train", "held-out"} <= found.keys():
        raise SystemExit(f"{folder} has no train-0.npz and held-out.npz: `pretrain.py tokens` makes them")
    return {name: np.concatenate(parts) for name, parts in found.items()}


def batches(windows: torch.Tensor, steps: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """`steps` batches (size, length) of windows (n, length): all of them once in a random order, then anew."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-steps * size // len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(passes)])
    for chosen in order[: steps * size].to(windows.device).view(steps, size):
        yield windows[chosen].long()


# -- models


class BitLinear(nn.Module):
    """BitNet b1.58 (arXiv 2402.17764): ternary weight and 8-bit activations, straight-through, fp32 master.

    Without `ternary`, a float layer whose input is rounded.
    """

    def __init__(self, linear: nn.Linear, act_bits: int | None, ternary: bool = True) -> None:
        super().__init__()
        self.weight, self.act_bits, self.ternary = linear.weight, act_bits, ternary

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from peft_lrqat.ops.activations import Activations, round_activations

        weight = self.weight
        if self.ternary:
            with torch.autocast(x.device.type, enabled=False):
                scale = weight.abs().mean().clamp(min=1e-5)
                rounded = (weight / scale).round().clamp(-1, 1) * scale
                weight = weight + (rounded - weight).detach()
        x = x if self.act_bits is None else round_activations(x, Activations("bitnet", self.act_bits))
        return nn.functional.linear(x, weight)


def float_model(args: argparse.Namespace, init: str, seed: int, device: torch.device) -> nn.Module:
    """Random weights, drawn on the CPU so that every machine has the same; those of `--shape` on `device`, for time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LLAMA[args.shape] if args.shape else {
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // args.head_dim,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=args.vocabulary, max_position_embeddings=args.length, tie_word_embeddings=True, **shape
    )
    torch.manual_seed(seed)
    with torch.device(device if args.shape else "cpu"):
        model = LlamaForCausalLM(config)
    if init == "linear":
        for _, _, linear in targets(model):
            linear.reset_parameters()
    return model


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
        ternary = options["kind"] == "bitnet"
        if ternary or options["act_bits"]:
            for parent, name, linear in targets(model):
                setattr(parent, name, BitLinear(linear, options["act_bits"], ternary))
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


def coded(model: nn.Module) -> list[Any]:
    from peft_lrqat.tuners.lowbit_sr import LowBitTensor

    return [p for p in model.parameters() if isinstance(p, LowBitTensor)]


@torch.no_grad()
def saturated(weights: list[Any]) -> float | None:
    """Share of all codes that lie on the two outermost levels; None without low-bit weights."""
    from peft_lrqat.tuners.lowbit_sr.growth import at_ends

    if not weights:
        return None
    counts = sum(at_ends(w.packed, w.scale, w.grid, w.shape[1]).sum(dtype=torch.float64) for w in weights)
    return (counts / sum(w.numel() for w in weights)).item()


def projected_loss(model: nn.Module, windows: torch.Tensor, size: int) -> float:
    """Held-out loss of a model of 8 bits that was not trained for it with the ternary projection of its codes."""
    config: Any = model.peft_config["default"]  # type: ignore[union-attr,index]
    config.forward_bits = 1.58
    loss = held_out_loss(model, windows, size).item()
    config.forward_bits = None
    return loss


def run_one(
    options: dict[str, Any], seed: int, data: dict, args: argparse.Namespace, report: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Train and measure one method; `report` gets what is known after each evaluation but the last."""
    device = data["train"].device
    cuda = device.type == "cuda"
    model, optimizer, rates = prepare(float_model(args, options["init"], seed, device), options, device)
    model.train()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    fused = bool(options.get("fused_backward"))  # then weights change in backward, which no graph has and no clipping
    step = Step(model, trained, (args.batch, args.length), graph=cuda and not args.no_graph and not fused)
    warm, every = max(1, round(args.steps * args.warmup)), max(1, args.steps // args.evaluations)
    curve: list[tuple[int, float, float | None]] = []
    losses: list[torch.Tensor] = []
    weights = coded(model)
    weight, at_first = weights[len(weights) // 2] if weights else None, saturated(weights)
    few = data["held-out"][: max(1, args.eval_tokens // args.length)]
    started = evaluating = 0.0
    untimed = min(5, args.steps - 1)  # they compile kernels and capture the graph
    described = {**{key: value for key, value in options.items() if key != "act_bits" or value}, "seed": seed}
    for number, rows in enumerate(batches(data["train"], args.steps, args.batch, seed), start=1):
        part = number / warm
        if number > warm:
            part = 0.5 * (1 + math.cos(math.pi * (number - warm) / max(1, args.steps - warm)))
        for (tensor, peak), floor in zip(rates, (options["floor"], 0.0), strict=True):
            tensor.fill_(peak * (max(part, floor) if number > warm else part))
        if number == untimed + 1:
            if cuda:
                torch.cuda.synchronize()
            started, evaluating = time.perf_counter(), 0.0
        losses.append(step(rows))
        if not fused:
            nn.utils.clip_grad_norm_(trained, 1.0)
        look = number % every == 0 or number == args.steps
        before = weight.codes() if look and weight is not None and not fused else None
        optimizer.step()
        if look:
            flipped = None if before is None else (weight.codes() != before).float().mean().item()  # type: ignore[union-attr]
            if cuda:
                torch.cuda.synchronize()
            paused = time.perf_counter()
            curve.append((number, held_out_loss(model, few, args.batch).item(), flipped))
            if number < args.steps:
                report({**described, "curve": curve, "unfinished": number})
            evaluating += time.perf_counter() - paused
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started - evaluating
    result = {
        **described,
        "curve": curve,
        "loss": held_out_loss(model, data["held-out"], args.batch).item(),
        "train_loss": torch.stack(losses)[-max(1, args.steps // 50) :].mean().item(),
        "other_loss": held_out_loss(model, data["other"], args.batch).item() if "other" in data else None,
        "saturated": [at_first, saturated(weights)] if weights else None,
        "seconds_per_step": seconds / (args.steps - untimed) if args.per_gpu == 1 else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "linear_weights": sum(p.numel() for p in optimizer.param_groups[0]["params"]),
    }
    if options.get("bits") == 8 and "forward_bits" not in options:
        result["projected_loss"] = projected_loss(model, data["held-out"], args.batch)
    return result


def read_windows(args: argparse.Namespace, device: torch.device) -> dict[str, torch.Tensor]:
    """The texts of `read_tokens` as windows, int32 (n, length)."""
    data: dict[str, torch.Tensor] = {}
    for name, tokens in read_tokens(Path(args.tokens)).items():
        tokens = tokens if name == "train" else tokens[: args.held_out_tokens]
        whole = torch.from_numpy(tokens[: len(tokens) // args.length * args.length].astype(np.int32))
        data[name] = whole.view(-1, args.length).to(device)
    return data


def work(args: argparse.Namespace) -> None:
    """One run, in a process of its own: reads the plan, writes `run-NNNN.json` beside it."""
    plan = Path(args.plan)
    read = json.loads(plan.read_text())
    method, seed = read["jobs"][args.number]
    args = argparse.Namespace(**read["args"], number=args.number)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def report(result: dict[str, Any]) -> None:
        write_json(plan.parent / f"run-{args.number:04}.json", result)

    report(run_one(parse_method(method, args.act_bits), seed, read_windows(args, device), args, report))


#: What does not change a result.
_HOW = ("methods", "tokens", "out", "seeds", "per_gpu", "limit")


def run(args: argparse.Namespace) -> None:
    for text in args.methods:
        parse_method(text, args.act_bits)  # an early error
    windows = len(read_tokens(Path(args.tokens))["train"]) // args.length
    one_pass = windows // args.batch
    args.steps = args.steps or one_pass * args.passes
    if args.steps * args.batch > args.passes * windows:
        raise SystemExit(
            f"`--steps` is {args.steps} batches of {args.batch} windows, but the text has {windows} windows of "
            f"{args.length} tokens: {one_pass} steps a pass. Ask for at most {one_pass * args.passes} steps, or allow "
            "more with `--passes`."
        )
    settings = {key: value for key, value in vars(args).items() if key not in _HOW}
    report = {**provenance(), **settings, "per_gpu": args.per_gpu}
    report["tokens_seen"] = args.steps * args.batch * args.length
    known = runs_of(Path(args.out), settings)
    finished = [one for one in known if "unfinished" not in one]
    have = {(one["method"], one["seed"]) for one in finished}
    jobs = [(text, seed) for seed in args.seeds for text in args.methods if (text, seed) not in have]
    print(f"{len(jobs)} runs of {args.steps} steps; {len(finished)} are there", flush=True)
    gpus: list[int | None] = list(range(torch.cuda.device_count())) or [None]
    end = time.monotonic() + args.limit
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a `timeout` around it: the workers go as well
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "plan.json", {"jobs": jobs, "args": vars(args)})
        failed = False
        waiting, running, seen = list(range(len(jobs))), {}, {}  # type: ignore[var-annotated]
        free = [gpu for _ in range(args.per_gpu) for gpu in gpus]
        try:
            while (waiting or running) and time.monotonic() < end:
                while waiting and free:
                    gpu, number = free.pop(0), waiting.pop(0)
                    chosen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": visible_gpu(gpu)}
                    command = [sys.executable, __file__, "work", f"{folder}/plan.json", str(number)]
                    running[number] = subprocess.Popen(command, env={**os.environ, **chosen}), gpu
                time.sleep(0.2)
                for number, (process, gpu) in list(running.items()):
                    if process.poll() is not None:
                        del running[number]
                        free.append(gpu)
                        failed = failed or process.returncode != 0
                        print(
                            f"{time.monotonic() - end + args.limit:.0f} s: {_said(jobs[number], process)}", flush=True
                        )
                found = {path: path.stat().st_mtime_ns for path in sorted(Path(folder).glob("run-*.json"))}
                if found != seen:
                    seen = found
                    runs = [json.loads(path.read_text()) for path in seen]
                    new = {(one["method"], one["seed"]) for one in runs}
                    old = [one for one in known if (one["method"], one["seed"]) not in new]
                    write_json(Path(args.out), {**report, "runs": [*old, *runs]})
        finally:
            for process, _ in running.values():
                process.kill()
                process.wait()
    for text, seed in [jobs[number] for number in (*running, *waiting)]:
        print(f"not finished: {text}, seed {seed}", flush=True)
    if failed:
        raise SystemExit("Some runs failed.")


def _said(job: tuple[str, int], process: subprocess.Popen) -> str:
    return f"{job[0]}, seed {job[1]}: " + ("done" if process.returncode == 0 else f"FAILED ({process.returncode})")


def runs_of(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that `out` has, if it is there; SystemExit if they have other settings."""
    if not out.exists():
        return []
    report = json.loads(out.read_text())
    other = [key for key in settings if key in report and report[key] != settings[key]]
    if other:
        raise SystemExit(
            f"{out} has runs with " + ", ".join(f"{key} {report[key]}" for key in other) + "; asked for are "
            f"{', '.join(f'{settings[key]}' for key in other)}. Name another file with `--out`, or delete this one."
        )
    return report["runs"]


# -- results


def read(paths: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    reports = [json.loads(Path(path).read_text()) for path in paths]
    return reports[0], [one for report in reports for one in report["runs"]]


def table(args: argparse.Namespace) -> None:
    """Print what `table_rows` makes."""
    print(table_rows(args.runs))


def table_rows(files: list[str]) -> str:
    """Markdown, a row for each method: means over its seeds; ± is half of what lies between two. Columns of nothing are
    left out.

    Differences are from the first full-precision and the first BitNet method among the files that has the same
    initialization.
    """
    _, runs = read(files)
    cut_off = [one for one in runs if "unfinished" in one]
    runs = [one for one in runs if "unfinished" not in one]
    rows: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        rows.setdefault(one["method"], []).append(one)

    def mean(row: list[dict[str, Any]], key: str) -> float | None:
        found = [one[key] for one in row if one.get(key) is not None]
        return statistics.mean(found) if found else None

    def beside(row: list[dict[str, Any]], kind: str) -> str:
        init = row[0].get("init")
        known = next((r for r in rows.values() if (r[0]["kind"], r[0].get("init")) == (kind, init)), row)
        return "" if known is row else f"{100 * (mean(row, 'loss') / mean(known, 'loss') - 1):+.2f} %"  # type: ignore[operator]

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    head = (
        *("method", "seeds", "held-out loss", "to float", "to BitNet", "training loss", "other text"),
        *(
            "ternary inference of it",
            "codes at the ends, start -> end",
            "codes changed a step",
            "peak GiB",
            "ms a step",
        ),
    )
    lines = [head, ("---", *["---:"] * (len(head) - 1))]
    for method, row in rows.items():
        losses = [one["loss"] for one in row]
        spread = f" ± {(max(losses) - min(losses)) / 2:.4f}" if len(row) > 1 else ""
        ends = [one["saturated"] for one in row if one.get("saturated")]
        at_ends = " -> ".join(f"{statistics.mean(end[i] for end in ends):.3f}" for i in (0, 1)) if ends else ""
        seconds = mean(row, "seconds_per_step")
        flips = [flip for one in row for _, _, flip in one["curve"] if flip is not None]
        cells = (
            method,
            str(len(row)),
            f"{statistics.mean(losses):.4f}{spread}",
            beside(row, "float"),
            beside(row, "bitnet"),
            shown(mean(row, "train_loss"), ".3f"),
            shown(mean(row, "other_loss"), ".4f"),
            shown(mean(row, "projected_loss"), ".4f"),
            at_ends,
            f"{100 * max(flips):.2g} %" if flips else "",
            shown(mean(row, "peak_gib"), ".2f"),
            shown(seconds and 1e3 * seconds, ".1f"),
        )
        lines.append(cells)
    kept = [place for place, _ in enumerate(head) if any(line[place] for line in lines[2:])]
    text = "\n".join(f"| {' | '.join(line[place] for place in kept)} |".replace("|  |", "| |") for line in lines)
    for one in cut_off:
        step, loss, _ = one["curve"][-1]
        text += f"\n\n(cut off: {one['method']}, seed {one['seed']}, at step {step} with a held-out loss of {loss:.4f})"
    return text.replace("|  |", "| |")


def plot(args: argparse.Namespace) -> None:
    """Held-out loss against steps: means over seeds, on the tokens that are looked at while it trains."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    report, runs = read(args.runs)
    figure, axes = plt.subplots(figsize=(9, 5))
    shades = {bits: f"C{number}" for number, bits in enumerate(sorted({one.get("bits", 0) for one in runs}))}
    lowest = math.inf
    for method in dict.fromkeys(one["method"] for one in runs):
        here = [one for one in runs if one["method"] == method]
        first = here[0]
        losses = [statistics.mean(point[1] for point in points) for points in zip(*[o["curve"] for o in here])]  # noqa: B905
        lowest = min(lowest, *losses)
        style = "--" if first["kind"] == "bitnet" or "forward_bits" in first else "-"
        axes.plot(
            [step for step, _, _ in first["curve"][: len(losses)]],
            losses,
            ":" if method.startswith("dqt") else style,
            color=shades[first["bits"]] if "bits" in first else "grey" if first["kind"] == "bitnet" else "black",
            linewidth=0.8 if ":" in method else 1.6,  # a preset with changed options
            label=f"{method}  {losses[-1]:.3f}",
        )
    axes.set_xlabel(f"steps of {report['batch'] * report['length']} tokens")
    axes.set_ylabel("held-out loss, nats a token")
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
    tokens.add_argument("--text", required=True, help="what text.py --set pretrain wrote")
    tokens.add_argument("--out", required=True)
    tokens.add_argument("--train-tokens", type=int, help="about so many of the text, where a run needs no more")
    one = commands.add_parser("run")
    one.set_defaults(do=run)
    one.add_argument("methods", nargs="+", help=", ".join(PRESETS))
    one.add_argument("--tokens", required=True)
    one.add_argument("--out", required=True)
    add = one.add_argument
    add("--shape", choices=list(LLAMA), help="that Llama's shapes, for memory and time; the next four are then unused")
    add("--vocabulary", type=int, default=49152)
    add("--hidden", type=int, default=384)
    add("--intermediate", type=int, default=1024)
    add("--layers", type=int, default=8)
    add("--head-dim", type=int, default=64)
    add("--length", type=int, default=512)
    add("--batch", type=int, default=64)
    add("--steps", type=int, help="of batch * length tokens; without it: all of the text")
    add("--passes", type=int, default=1, help="how often the text may be seen")
    add("--act-bits", type=int, choices=(0, 8), help="8: all methods round activations; 0: none does")
    add("--warmup", type=float, default=0.05, help="share of the steps; cosine to zero after it")
    add("--evaluations", type=int, default=20)
    add("--eval-tokens", type=int, default=1 << 18, help="of the curve; the loss at the end is of all")
    add("--held-out-tokens", type=int, help="of each text that is held out; without it: all")
    add("--no-graph", action="store_true", help="on a GPU: run every step eagerly")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--per-gpu", type=int, default=1, help="runs at a time on each GPU (without one: on the CPU)")
    add("--limit", type=float, default=1e9, help="seconds, after which what is running is dropped")
    worker = commands.add_parser("work")
    worker.set_defaults(do=work)
    worker.add_argument("plan")
    worker.add_argument("number", type=int)
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
