"""How memory and time of a training step grow: one axis at a time around a small model of 7B's widths.

    python benchmarks/growth.py run --out benchmarks/results/growth.json
    python benchmarks/growth.py plot                                       # the drawing of the page, from it
    python benchmarks/growth.py run --smoke --out growth.json              # tiny shapes, on a CPU too

LR-QAT packed to 4 bits in groups of 128, and PEFT's LoRA beside it. In the middle are 4 blocks of hidden size 4096,
4 rows of 1024 tokens and rank 32. Steps are measured as gpu.py does, under bf16 autocast as TRL trains. The axis of
experts is measured as moe.py does: 4 blocks of Qwen3-30B-A3B, rank 8, one scale change a channel. The axis of weights
is `get_peft_model` with the search for scales that is the default, after a first call that is not counted.

Two exponents say how the last three points of an axis climb; they lie by one factor apart. `slope` is that of a line on
logarithmic scales. What does not grow (embeddings, the head, Python) makes it smaller. `power` is p of
c + a x^p through the three points. What does not grow has no part in it, but noise has a large one where little grows.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import gpu
import moe
import torch
from common import LLAMA, RESULTS, provenance, write_json
from gpu import held, peak, reset_peak
from training import targets

METHODS = ("LR-QAT int4, groups of 128", "LoRA bf16")
MIXTURES = ("LR-QAT int4, groups of 128, by channel", "LoRA bf16")
#: axis -> what stands below it
AXES = {
    "layers": "blocks",
    "tokens": "tokens of a step, in rows of 1024",
    "length": "tokens of a step, in one row",
    "rank": "rank",
    "hidden": "hidden size",
    "experts": "experts of a block",
    "weights": "weights converted, billions",
}
QUANTITIES = {"seconds": "seconds", "peak_gib": "peak, GiB"}


class Llama(NamedTuple):
    """A model that is measured; the middle, if nothing else is said."""

    layers: int = 4
    hidden: int = 4096
    rank: int = 32


def plan(axes: list[str], smoke: bool) -> dict[str, list[tuple[int, Llama, str]]]:
    """axis -> its points: the value, the model, and the batch."""
    length, first = (8, Llama(2, 128, 4)) if smoke else (1024, Llama())
    middle = f"{2 if smoke else 4}x{length}"
    rows = (1, 2, 4) if smoke else (1, 2, 4, 8, 16)
    found = {
        "layers": [(n, first._replace(layers=n), middle) for n in ((1, 2, 4) if smoke else (2, 4, 8, 16))],
        "tokens": [(n * length, first, f"{n}x{length}") for n in rows],
        "length": [(n * length, first, f"1x{n * length}") for n in rows],
        "rank": [(n, first._replace(rank=n), middle) for n in ((2, 4, 8) if smoke else (4, 16, 64, 256))],
        "hidden": [
            (n, first._replace(hidden=n), middle) for n in ((128, 256, 512) if smoke else (1024, 2048, 4096, 8192))
        ],
    }
    return {axis: steps for axis, steps in found.items() if axis in axes}


def widths(hidden: int) -> str:
    """The name under which gpu.py finds a Llama of this width; its MLP is 7B's, as nearly as groups of 128 allow."""
    heads = max(1, hidden // 128)
    inner = round(hidden * LLAMA["7B"]["intermediate_size"] / LLAMA["7B"]["hidden_size"] / 128) * 128
    gpu.SHAPES[f"hidden {hidden}"] = LLAMA["7B"] | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
    }
    return f"hidden {hidden}"


def settings(model: Llama, batches: list[str], args: argparse.Namespace) -> argparse.Namespace:
    """The options of `gpu.py run` that measure a model."""
    options = ["run", "--out", "", "--autocast", "--layers", str(model.layers), "--rank", str(model.rank)]
    options += ["--warm", str(args.warm), "--steps", str(args.steps), "--batches", *batches]
    chosen = gpu.options().parse_args(options)
    chosen.size = widths(model.hidden)
    return chosen


def llamas(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """The axes of `plan`; each model is made once for a method."""
    axes = plan(args.axes, args.smoke)
    batches: dict[Llama, list[str]] = {}
    for _, model, batch in (point for points in axes.values() for point in points):
        batches.setdefault(model, [])
        if batch not in batches[model]:
            batches[model].append(batch)
    runs = []
    for method in METHODS:
        known = {model: gpu.measure(method, settings(model, wanted, args), device) for model, wanted in batches.items()}
        for axis, points in axes.items():
            runs += [row(axis, value, method, known[model]["steps"][batch]) for value, model, batch in points]
    return runs


def mixtures(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """The axis of experts."""
    runs = []
    for method in MIXTURES:
        for experts in (4, 8, 16) if args.smoke else (16, 32, 64, 128):
            options = ["--out", "", "--experts", str(experts), "--warm", str(args.warm), "--steps", str(args.steps)]
            options += ["--layers", "2" if args.smoke else "4", "--batches", "2x16" if args.smoke else "4x1024"]
            chosen = moe.options().parse_args([*options, *(["--smoke"] if args.smoke else [])])
            found = moe.measure(method, 8, False, chosen, device)
            runs.append(row("experts", experts, method, *found["steps"].values()))
    return runs


def conversions(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """The axis of weights: 1, 2 and 4 blocks."""
    from peft import get_peft_model

    from peft_lrqat import LRQATConfig

    runs = []
    for blocks in (1, 1, 2, 4):
        gc.collect()
        chosen = settings(Llama(blocks, 128 if args.smoke else 4096), ["1x1"], args)
        model = gpu.skeleton(chosen.size, blocks, keep_rng_state=True)
        gpu.fill(model, device)
        weights = sum(layer.weight.numel() for *_, layer in targets(model))
        reset_peak(device)
        begin = time.perf_counter()
        config = LRQATConfig(downcast="int", target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        if device == "cuda":
            torch.cuda.synchronize()
        found = {"seconds": time.perf_counter() - begin, "peak_gib": peak(device)}
        runs.append(row("weights", weights / 1e9, METHODS[0], found))
        del model
    return runs[1:]


def row(axis: str, value: float, method: str, step: dict[str, float]) -> dict[str, Any]:
    """One point; a CPU has no peak."""
    found = {name: step[name] for name in QUANTITIES if step[name]}
    print(f"{axis:8} {value:<8.4g} {method:40} " + "  ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
    return {"axis": axis, "value": value, "method": method, **found}


def exponents(values: list[float], found: list[float]) -> dict[str, float | None]:
    """`slope` and `power` of the last three points; the second is None where the points do not climb ever further."""
    x, y = [[math.log(number) for number in numbers[-3:]] for numbers in (values, found)]
    middle = sum(x) / 3
    slope = sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)
    first, last = found[-2] - found[-3], found[-1] - found[-2]
    power = math.log(last / first) / (x[2] - x[1]) if first > 0 and last > 0 else None
    return {"slope": slope, "power": power}


def growth(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The exponents of every axis and method, with the first and the last point."""
    rows = []
    for axis, method in dict.fromkeys((run["axis"], run["method"]) for run in runs):
        points = [run for run in runs if (run["axis"], run["method"]) == (axis, method)]
        found: dict[str, Any] = {"axis": axis, "kind": "LoRA" if method.startswith("LoRA") else "LR-QAT"}
        for name in QUANTITIES:
            if all(name in point for point in points):
                numbers = [point[name] for point in points]
                ends = {"first": numbers[0], "last": numbers[-1]}
                found[name] = ends | exponents([point["value"] for point in points], numbers)
        rows.append(found | {"from": points[0]["value"], "to": points[-1]["value"]})
    return rows


def run(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = {key: value for key, value in vars(args).items() if key not in ("do", "out")}
    result: dict[str, Any] = {"command": command, **provenance(), "runs": []}
    for measured, axes in ((llamas, list(AXES)[:5]), (mixtures, ["experts"]), (conversions, ["weights"])):
        if not set(axes) & set(args.axes):
            continue
        begin = time.perf_counter()
        result["runs"] += measured(args, device)
        result["growth"] = growth(result["runs"])
        write_json(args.out, result)
        print(f"{measured.__name__}: {time.perf_counter() - begin:.0f} s, {held(device):.2f} GiB held", flush=True)


def plot(args: argparse.Namespace) -> None:
    """Small multiples: a row for each axis, time on the left and memory on the right."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "growth", "svg.fonttype": "none", "font.size": 8}
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    found = json.loads(args.results.read_text(encoding="utf-8"))
    axes = [axis for axis in AXES if any(run["axis"] == axis for run in found["runs"])]
    across = math.ceil(len(axes) / 2)
    figure, panels = plt.subplots(4, across, figsize=(2.5 * across, 8.4), squeeze=False)
    for panel in panels.flat:
        panel.set_visible(False)
    for number, axis in enumerate(axes):
        for line, (name, label) in enumerate(QUANTITIES.items()):
            panel = panels[2 * (number // across) + line, number % across]
            panel.set_visible(True)
            titles = []
            for kind, color, marker in (("LR-QAT", "#4477aa", "o"), ("LoRA", "#999999", "s")):
                points = [run for run in found["runs"] if run["axis"] == axis and run["method"].startswith(kind)]
                if not points or name not in points[0]:
                    continue
                panel.plot(
                    *([point[key] for point in points] for key in ("value", name)), color=color, marker=marker, ms=4,
                    label="LR-QAT, packed 4 bits" if kind == "LR-QAT" else kind,
                )  # fmt: skip
                (exponent,) = [
                    row[name]["slope"] for row in found["growth"] if (row["axis"], row["kind"]) == (axis, kind)
                ]
                titles.append(f"{kind} {exponent:.2f}")
            panel.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel=label)
            panel.set_title("slope: " + ", ".join(titles), fontsize=8)
            values = [run["value"] for run in found["runs"] if run["axis"] == axis]
            panel.set_xticks(values)
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for scale in (panel.xaxis, panel.yaxis):
                scale.set_minor_locator(NullLocator())
                scale.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.2g}" if n < 100 else f"{n:.0f}"))
            panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="lower right", frameon=False)
    figure.suptitle(f"A training step, {found['device']}")
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    one.set_defaults(do=run)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    one.add_argument("--warm", type=int, default=2)
    one.add_argument("--steps", type=int, default=5)
    one.add_argument("--smoke", action="store_true", help="tiny shapes")
    drawn = commands.add_parser("plot")
    drawn.set_defaults(do=plot)
    drawn.add_argument("results", type=Path, nargs="?", default=RESULTS / "growth.json")
    drawn.add_argument("--out", type=Path, default=RESULTS.parents[1] / "docs" / "images" / "growth.svg")
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
