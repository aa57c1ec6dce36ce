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

_HIDDEN = {"method", "then", "bits", "group", "symmetric", "seed", "hellaswag", "steps", "iters"}
_OPTIONS = {
    ("signed", "True"): "signed scales",
    ("downcast", "int"): "packed base",
    ("learn_scales", "channel"): "scales by channel",
}
_SHOWN = {"start_windows": "windows of text", "start_epochs": "passes", "start_batch": "windows a step"}
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
    "float": "full fine-tuning in float",
}

#: What rounds a float model, as the rows call it.
_ROUNDED_BY = {"gptq": "GPTQ", "blockwise": "block-wise", **_METHODS}

_NBSP = "\N{NO-BREAK SPACE}"


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


def _name(job: dict[str, Any]) -> str:
    return f"LoRA, merged, then {_ROUNDED_BY[job['then']]}" if job["then"] else _METHODS[job["method"]]


def label_of(job: dict[str, Any]) -> str:
    """The method and what differs from its defaults."""
    words = []
    if job["steps"] == 0 and job["start"]:
        name = _ROUNDED_BY.get(job["start"], job["start"])
    else:
        name = _name(job)
        if job["start"]:
            words.append({"gptq": "from GPTQ", "blockwise": "from block-wise"}.get(job["start"], job["start"]))
        if job["steps"] not in (0, DEFAULTS["steps"]):
            words.append(f"{job['steps']} steps")
    if job["kl"]:
        words.append("KL" if job["kl"] == 1 else f"KL {job['kl']:g}")
    for key, value in job.items():
        default = LEARNING_RATES.get(job["method"]) if key == "lr" else DEFAULTS.get(key)
        if key not in _HIDDEN | {"start", "kl"} and value != default:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            words.append(_OPTIONS.get((key, shown)) or f"{_SHOWN.get(key, key)} {shown}")
    return ", ".join([name, *words])


def read(files: list[str]) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """The rows, and each model's float figures. Of one row and seed, the run in the last file counts."""
    found: dict[tuple[str, tuple[int, int, bool], str], dict[int, dict[str, Any]]] = defaultdict(dict)
    floats: dict[str, dict[str, Any]] = {}
    for file in files:
        data = json.loads(Path(file).read_text())
        if data.get("healed"):
            floats[data["model"]] = data["healed"]["after"]
        for run in data["runs"]:
            run["job"] = job = {**DEFAULTS, **run["job"]}  # an older file has fewer options
            found[data["model"], (job["bits"], job["group"], job["symmetric"]), label_of(job)][job["seed"]] = run
    return [Row(*key, list(runs.values())) for key, runs in found.items()], floats


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


def caption(model: str, rows: list[Row], floats: dict[str, dict[str, Any]], text: str) -> str:
    """The float model's perplexity, and what as many more steps in float make of it, if that was measured."""
    tuned = [row for row in rows if row.model == model and is_float(row)]
    best = min(tuned, key=lambda row: row.mean("tune", "ppl"), default=None)
    more = f"; fine-tuned in float: {best.mean(text, 'ppl'):.2f}" if best else ""
    return f"float: {floats[model][text]['ppl']:.2f}{more}"


def is_float(row: Row) -> bool:
    """Whether nothing is rounded: such a row belongs to no grid."""
    return row.runs[0]["job"]["method"] == "float"


def grid_name(grid: tuple[int, int, bool]) -> str:
    bits, group, symmetric = grid
    return f"{bits} bits, {'per channel' if group < 0 else f'groups of {group}'}{'' if symmetric else ', asymmetric'}"


def table(args: argparse.Namespace) -> None:
    """Print (or write) what `all_rows` makes."""
    _give(all_rows(args.files, args.text), args.out)


def summary(args: argparse.Namespace) -> None:
    """Print (or write) what `best_rows` makes."""
    _give(best_rows(args.files, args.text), args.out)


def activations(args: argparse.Namespace) -> None:
    """Print (or write) what `activation_rows` makes."""
    _give(activation_rows(args.files, args.text), args.out)


def _give(text: str, out: str | None) -> None:
    if out:
        Path(out).write_text(text)
    else:
        print(text)


def all_rows(files: list[str], text: str = "report") -> str:
    """Markdown: one table a model and grid.

    Args:
        text: whose figures come first.
    """
    rows, floats = read(files)
    lines: list[str] = []
    order = sorted({(r.model, r.grid) for r in rows if not is_float(r)}, key=lambda key: (key[0], order_of(key[1])))
    for model, grid in order:
        here = [row for row in rows if (row.model, row.grid) == (model, grid) and not is_float(row)]
        here.sort(key=lambda row: -row.mean(text, "ppl"))
        if model in floats:
            wikitext2 = floats[model]["wikitext2"]["ppl"]
            lines.append(
                f"\n{model}, {grid_name(grid)} ({caption(model, rows, floats, text)}, WikiText-2 {wikitext2:.2f})\n"
            )
        lines += [
            "| | perplexity | recovered | KL | same token | WikiText-2 | HellaSwag | seeds |",
            "|---|" + "---|" * 7,
        ]
        for row in here:
            spread, share = row.spread(text), recovered(row, rows, floats, text)
            tasks = [run["hellaswag"] for run in row.runs if "hellaswag" in run]
            task = (
                f"{100 * statistics.fmean(t['accuracy'] for t in tasks):.1f} ± {100 * tasks[0]['stderr']:.1f}"
                if tasks
                else ""
            )
            lines.append(
                f"| {row.label} | {row.mean(text, 'ppl'):.2f}{'' if math.isnan(spread) else f' ± {spread:.2f}'} "
                f"| {'' if math.isnan(share) else f'{100 * share:.0f} %'} | {row.mean(text, 'kl'):.4f} "
                f"| {100 * row.mean(text, 'agree'):.1f} % | {row.mean('wikitext2', 'ppl'):.2f} | {task} "
                f"| {len(row.runs)} |"
            )
    return "\n".join(lines).strip() + "\n"


def best_of(rows: list[Row]) -> dict[str, dict[tuple[int, int, bool], Row]]:
    """By family and grid, the row whose settings are best on `tune`, of those with as many steps as the others.

    Rows that train norms too are left out.
    """
    best: dict[str, dict[tuple[int, int, bool], Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: -row.mean("tune", "ppl")):
        job = row.runs[0]["job"]
        if job["steps"] in (0, DEFAULTS["steps"]) and not job["norm_lr"]:
            best[family(job)][row.grid] = row
    return best


def order_of(grid: tuple[int, int, bool]) -> tuple[int, bool, int, bool]:
    bits, group, symmetric = grid
    return -bits, group < 0, -group, not symmetric


def best_rows(files: list[str], text: str = "report", name: str = "") -> str:
    """Markdown: a table a model, methods by grids, perplexity and what was recovered; the best of a grid is bold.

    Grids at which nothing was just rounded are left out.

    Args:
        name: what the model's begins with.
    """
    rows, floats = read(files)
    lines: list[str] = []
    for model in sorted((model for model in floats if model.startswith(name)), reverse=True):
        best = best_of([row for row in rows if row.model == model and not is_float(row)])
        shares = {
            method: {
                grid: share
                for grid, row in found.items()
                if not math.isnan(share := recovered(row, rows, floats, text))
            }
            for method, found in best.items()
        }
        grids = sorted({grid for share in shares.values() for grid in share}, key=order_of)
        lines += [
            f"\n| {model} ({caption(model, rows, floats, text)}) | " + " | ".join(map(grid_name, grids)) + " |",
            "|---|" + "---:|" * len(grids),
        ]
        top = {grid: max(share.get(grid, -math.inf) for share in shares.values()) for grid in grids}
        for method in sorted(filter(shares.get, best), key=lambda method: statistics.fmean(shares[method].values())):
            cells = []
            for grid in grids:
                share = shares[method].get(grid)
                if share is None:
                    cells.append("")
                    continue
                cell = f"{best[method][grid].mean(text, 'ppl'):.2f}{_NBSP}({100 * share:.0f}{_NBSP}%)"
                cells.append(f"**{cell}**" if share == top[grid] else cell)
            lines.append(f"| {method} | {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines).strip() + "\n"


class Setting(NamedTuple):
    """How a row rounds activations and the KV cache; in the order of a table."""

    bits: float  # of the weights
    act_bits: int = 16
    kv_bits: int = 16
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        cache = "" if self.kv_bits == 16 else f"KV{self.kv_bits}"
        return ", ".join((f"W{self.bits:g}A{self.act_bits}{cache}", *self.words))


def setting_of(job: dict[str, Any]) -> Setting:
    words = [f"`{key}` A{value or 16}" for key, value in (job.get("act_bits_pattern") or {}).items()]
    words += [f"groups of {job['act_group_size']}"] if job.get("act_group_size") else []
    words += [f"vLLM's {part}" for part, key in (("A", "act_rule"), ("KV", "kv_rule")) if job.get(key) == "vllm"]
    words += ["fixed scales"] if job.get("act_scale") == "static" else []
    return Setting(job["bits"], job.get("act_bits") or 16, job.get("kv_bits") or 16, tuple(words))


def stage_of(job: dict[str, Any]) -> str:
    """What was done to the weights of a row."""
    stage = "trained" if job["steps"] else _STAGES[job["start"]]
    return f"{stage}, rotated" if job["rotate"] else stage


_STAGES = {None: "rounded to nearest", "blockwise": "block-wise", "gptq": "GPTQ", "": "trained"}


def activation_rows(files: list[str], text: str = "report") -> str:
    """Markdown: a table a model and grid, settings of activations by what was done to the weights.

    A cell is the perplexity of that setting's best row on `tune`. In brackets is how much more that is than with float
    activations, not rotated.
    """
    rows, floats = read(files)
    lines: list[str] = []
    for model, grid in sorted({(row.model, row.grid) for row in rows}, key=lambda key: (key[0], order_of(key[1]))):
        best: dict[tuple[Setting, str], Row] = {}
        for row in sorted(rows, key=lambda row: -row.mean("tune", "ppl")):
            if (row.model, row.grid) == (model, grid):
                job = row.runs[0]["job"]
                best[setting_of(job), stage_of(job)] = row
        stages = [s for stage in _STAGES.values() for s in (stage, f"{stage}, rotated") if any(s == b for _, b in best)]
        about = f" (float: {floats[model][text]['ppl']:.2f})" if model in floats else ""
        lines += [
            f"\n| {model}, {grid_name(grid)}{about} | " + " | ".join(stages) + " |",
            "|---|" + "---:|" * len(stages),
        ]
        order = sorted({setting for setting, _ in best}, key=lambda s: (s.bits, -s.act_bits, -s.kv_bits, s.words))
        for setting in order:
            cells = []
            for stage in stages:
                row, plain = best.get((setting, stage)), best.get((Setting(grid[0]), stage.removesuffix(", rotated")))
                cells.append("" if row is None else f"{row.mean(text, 'ppl'):.2f}")
                if row and plain and row is not plain:
                    cells[-1] += f" ({100 * (row.mean(text, 'ppl') / plain.mean(text, 'ppl') - 1):+.1f}{_NBSP}%)"
            lines.append(f"| {setting} | {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines).strip() + "\n"


def plot(args: argparse.Namespace) -> None:
    """For each model, one panel: the share recovered of what rounding loses, a bar a method, by grid."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, floats = read(args.files)
    models = sorted({row.model for row in rows if row.model in floats}, reverse=True)
    shares: dict[str, dict[str, dict[tuple[int, int, bool], float]]] = {
        model: {
            name: {
                grid: 100 * share
                for grid, row in found.items()
                if not math.isnan(share := recovered(row, rows, floats, args.text))
            }
            for name, found in best_of([row for row in rows if row.model == model and not is_float(row)]).items()
            if name != _METHODS["round"]  # 0 by definition
        }
        for model in models
    }
    grids = {
        model: sorted({grid for f in found.values() for grid in f}, key=order_of) for model, found in shares.items()
    }
    means: dict[str, list[float]] = defaultdict(list)
    for found in shares.values():
        for name, values in found.items():
            if values:
                means[name] += values.values()
    names = sorted(means, key=lambda name: statistics.fmean(means[name]))
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(11, 4), squeeze=False, layout="constrained", sharey=True,
        width_ratios=[len(grids[model]) for model in models],
    )  # fmt: skip
    for axis, model in zip(axes[0], models, strict=True):
        width = 0.85 / len(names)
        for number, name in enumerate(names):
            points = shares[model].get(name, {})
            places = [grids[model].index(grid) - 0.425 + (number + 0.5) * width for grid in points]
            shade = pyplot.get_cmap("viridis")(1 - number / max(1, len(names) - 1))
            axis.bar(places, [max(value, -5) for value in points.values()], width, label=name, color=shade)
        axis.set(title=model, xticks=range(len(grids[model])), ylim=(-5, 100))
        axis.set_xticklabels([grid_name(grid).replace(", ", "\n") for grid in grids[model]], fontsize=8)
        axis.grid(axis="y", linewidth=0.4)
        axis.set_axisbelow(True)
    axes[0][0].set_ylabel("recovered of what rounding loses, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(args.out or "accuracy.svg")


def family(job: dict[str, Any]) -> str:
    """What shares a mark in the plot."""
    longer = ", longer" if job["start_windows"] > DEFAULTS["start_windows"] or "start_epochs" in job else ""
    if job["steps"] == 0 and job["start"]:
        return _ROUNDED_BY.get(job["start"], job["start"]) + longer
    name = _name(job)
    if job["method"] == "round" and job["signed"]:
        return name + ", signed scales"
    taught = ", KL" if job["kl"] else ""
    if job["method"] == "scales" and job["start"] == "blockwise":
        return f"block-wise{longer}, then scales{taught}"
    return name + taught + (f", from block-wise{longer}" if job["start"] == "blockwise" else "")
