"""The table and the plot of accuracy.py, from its JSON."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from accuracy_methods import DEFAULTS, LEARNING_RATES

_HIDDEN = {"method", "bits", "group", "symmetric", "seed", "hellaswag", "steps", "iters", "start_windows"}
_METHODS = {
    "round": "rounded to nearest",
    "lsq": "full QAT (LSQ)",
    "lora": "LoRA, merged and rounded",
    "lrqat": "LR-QAT",
    "scales": "scales only",
    "lowbit": "low-bit SR",
    "hqq": "HQQ",
    "autoround": "AutoRound",
    "llmcompressor": "GPTQ (llm-compressor)",
    "float": "float, trained on",
}


class Row(NamedTuple):
    """One method at one grid: its runs, one a seed."""

    model: str
    grid: tuple[int, int, bool]  # bits, group, symmetric
    label: str
    runs: list[dict[str, Any]]

    def mean(self, text: str, name: str) -> float:
        values = [run[text][name] for run in self.runs]
        if name == "ppl":
            return math.exp(statistics.fmean(map(math.log, values)))
        return statistics.fmean(values)

    def spread(self, text: str) -> float:
        """Standard deviation of the perplexity between seeds."""
        values = [run[text]["ppl"] for run in self.runs]
        return statistics.stdev(values) if len(values) > 1 else math.nan


def label_of(job: dict[str, Any]) -> str:
    """The method and what differs from its defaults."""
    words = []
    if job["steps"] == 0 and job["start"]:
        name = {"gptq": "GPTQ", "blockwise": "block-wise"}.get(job["start"], job["start"])
    else:
        name = _METHODS[job["method"]]
        if job["start"]:
            words.append({"gptq": "from GPTQ", "blockwise": "from block-wise"}.get(job["start"], job["start"]))
        if job["steps"] not in (0, DEFAULTS["steps"]):
            words.append(f"{job['steps']} steps")
    if job["kl"]:
        words.append("KL" if job["kl"] == 1 else f"KL {job['kl']:g}")
    for key, value in job.items():
        default = LEARNING_RATES.get(job["method"]) if key == "lr" else DEFAULTS.get(key)
        if key not in _HIDDEN | {"start", "kl"} and value != default:
            words.append(f"{key} {value}")
    return ", ".join([name, *words])


def read(files: list[str]) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """The rows, and each model's float figures."""
    found: dict[tuple[str, tuple[int, int, bool], str], list[dict[str, Any]]] = defaultdict(list)
    floats: dict[str, dict[str, Any]] = {}
    for file in files:
        data = json.loads(Path(file).read_text())
        if data.get("healed"):
            floats[data["model"]] = data["healed"]["after"]
        for run in data["runs"]:
            run["job"] = job = {**DEFAULTS, **run["job"]}  # an older file has fewer options
            found[data["model"], (job["bits"], job["group"], job["symmetric"]), label_of(job)].append(run)
    return [Row(*key, runs) for key, runs in found.items()], floats


def recovered(row: Row, rows: list[Row], floats: dict[str, dict[str, Any]], text: str) -> float:
    """1 - ln(ppl / float) / ln(rounded / float); plainly rounded, with the better range norm. NaN: not known."""
    rounded = [
        other.mean(text, "ppl")
        for other in rows
        if (other.model, other.grid) == (row.model, row.grid)
        and (job := other.runs[0]["job"])["method"] == "round"
        and not job["signed"]
    ]
    if not rounded or row.model not in floats:
        return math.nan
    best = floats[row.model][text]["ppl"]
    return 1 - math.log(row.mean(text, "ppl") / best) / math.log(min(rounded) / best)


def grid_name(grid: tuple[int, int, bool]) -> str:
    bits, group, symmetric = grid
    return f"{bits} bits, {'per channel' if group < 0 else f'groups of {group}'}{'' if symmetric else ', asymmetric'}"


def table(args: argparse.Namespace) -> None:
    """Print (or write) Markdown: one table a model and grid."""
    rows, floats = read(args.files)
    lines: list[str] = []
    order = sorted(
        {(row.model, row.grid) for row in rows}, key=lambda key: (key[0], -key[1][0], key[1][1], not key[1][2])
    )
    for model, grid in order:
        here = [row for row in rows if (row.model, row.grid) == (model, grid)]
        here.sort(key=lambda row: -row.mean(args.text, "ppl"))
        if model in floats:
            figures = floats[model]
            lines.append(f"\n{model}, {grid_name(grid)} (float: {figures[args.text]['ppl']:.2f}, "
                         f"WikiText-2 {figures['wikitext2']['ppl']:.2f})\n")  # fmt: skip
        lines += [
            "| | perplexity | recovered | KL | same token | WikiText-2 | HellaSwag | seeds | s |",
            "|---|" + "---|" * 8,
        ]
        for row in here:
            spread, share = row.spread(args.text), recovered(row, rows, floats, args.text)
            tasks = [run["hellaswag"] for run in row.runs if "hellaswag" in run]
            task = (
                f"{100 * statistics.fmean(t['accuracy'] for t in tasks):.1f} ± {100 * tasks[0]['stderr']:.1f}"
                if tasks
                else ""
            )
            lines.append(
                f"| {row.label} | {row.mean(args.text, 'ppl'):.2f}{'' if math.isnan(spread) else f' ± {spread:.2f}'} "
                f"| {'' if math.isnan(share) else f'{100 * share:.0f} %'} | {row.mean(args.text, 'kl'):.4f} "
                f"| {100 * row.mean(args.text, 'agree'):.1f} % | {row.mean('wikitext2', 'ppl'):.2f} | {task} "
                f"| {len(row.runs)} | {statistics.fmean(run['seconds'] for run in row.runs):.0f} |"
            )
    text = "\n".join(lines) + "\n"
    if args.out:
        Path(args.out).write_text(text)
    else:
        print(text)


def plot(args: argparse.Namespace) -> None:
    """For each model, one panel: perplexity over float (log) of the rows, by grid; the best settings of each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, floats = read(args.files)
    models = sorted({row.model for row in rows if row.model in floats})
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(1.5 + 5 * len(models), 4.2), squeeze=False, layout="constrained"
    )
    for axis, model in zip(axes[0], models, strict=True):
        here = [row for row in rows if row.model == model and row.runs[0]["job"]["method"] != "float"]
        grids = sorted({row.grid for row in here}, key=lambda grid: (-grid[0], grid[1] < 0, not grid[2]))
        best: dict[str, dict[tuple[int, int, bool], float]] = defaultdict(dict)
        for row in sorted(here, key=lambda row: -row.mean("tune", "ppl")):  # settings are chosen on `tune`
            best[family(row.runs[0]["job"])][row.grid] = row.mean(args.text, "ppl") / floats[model][args.text]["ppl"]
        for number, (name, points) in enumerate(sorted(best.items(), key=lambda item: -max(item[1].values()))):
            places = [grids.index(grid) for grid in points]
            bold = name.startswith("LR-QAT")
            axis.plot(
                places,
                points.values(),
                "o" if bold else "x",
                label=name,
                color=f"C{number % 10}",
                markersize=8 if bold else 6,
            )
        axis.axhline(1, color="grey", linewidth=1)
        axis.set(title=model, yscale="log", ylabel="perplexity / float's", xticks=range(len(grids)))
        axis.set_xticklabels([grid_name(grid).replace(", ", "\n") for grid in grids], fontsize=7)
        axis.legend(fontsize=7)
    figure.savefig(args.out or "accuracy.svg")


def family(job: dict[str, Any]) -> str:
    """What shares a mark in the plot."""
    if job["steps"] == 0 and job["start"]:
        return {"gptq": "GPTQ", "blockwise": "block-wise"}.get(job["start"], job["start"])
    name = _METHODS[job["method"]]
    if job["method"] == "scales" and job["start"] == "blockwise":
        return "block-wise, then scales"
    return name + (", KL" if job["kl"] else "") + (", from block-wise" if job["start"] == "blockwise" else "")
