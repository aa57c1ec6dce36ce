"""What training does to the integers: a callback for any Trainer."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy
from transformers.utils import logging

from .arguments import check_flags, with_suggestions
from .installing import how_to_install
from .tuners.common.layer import MergingLayer
from .tuners.common.rules import is_positive
from .tuners.common.trainers import log_before_trackers, resumed_from
from .tuners.lrqat.layer import LRQATLayer

logger = logging.get_logger(__name__)

#: With a smaller share of changed integers, a model is nearly the rounded one.
_HARDLY = 1e-3
#: After fewer steps, training longer comes before all other advice.
_MANY_STEPS = 500
#: The learning rate to start from, with LR-QAT or without (low-bit SR).
_USUAL = {True: 1e-3, False: 3e-5}
#: All logs of a training with so few are looked at: each is a point of the curves.
_FEW_LOGS = 50
#: So many layers of a kind (q_proj, ...) are looked at.
_LAYERS = 8
#: What a checkpoint keeps of the samples: about four bytes for each weight that is looked at.
_FILE = "quantization_monitor.safetensors"


class Shares(NamedTuple):
    """Shares, from 0 to 1, of the integers that are looked at; the change of scales is relative."""

    changed: float
    changed_last: float
    reversed: float
    edge: float
    scale_change: float

    #: What each is, for the table and the plot.
    @staticmethod
    def words() -> dict[str, str]:
        return {
            "changed": "changed since the start",
            "changed_last": "changed since the last log",
            "reversed": "turned back at least once",
            "edge": "at an end of the grid",
            "scale_change": "mean relative change of the scales",
        }

    def logged(self) -> dict[str, float]:
        """What a log gets."""
        return {f"qat_{name}": round(value, 6) for name, value in self._asdict().items()}


class _Watched:
    """A sample of the integers and scales of layers that are alike in shape, and what has become of it.

    They are looked at together: a GPU takes as long for a tensor of one layer as for one of all.
    """

    #: What a checkpoint keeps of each layer, so that training that is resumed goes on counting.
    kept = ("start", "last", "way", "turned", "start_edge", "start_scale")

    def __init__(self, layers: dict[str, MergingLayer], rows: int) -> None:
        self.layers = layers
        any_layer = next(iter(layers.values()))
        self.rows = _spread(any_layer.frozen.out_features, rows).to(any_layer.frozen.device)
        found = [layer.sample_codes(self.rows, layer._adapters_at_work()) for layer in layers.values()]
        ends = torch.tensor([one[1:] for one in found if one is not None], device=self.rows.device)
        self.low, self.high = ends.to(torch.int16).view(-1, 2, 1, 1).unbind(1)  # of each layer's grid
        self.start = self.last = torch.stack([one[0] for one in found if one is not None])
        self.way = torch.zeros_like(self.start)  # the sign of each integer's last change
        self.turned = torch.zeros_like(self.start, dtype=torch.bool)
        self.start_edge = self._edge(self.start)
        # as many rows of scales as of integers, of this process's share; empty where there are none
        scales = [one for one in self._scales() if one is not None]  # of all layers, or of none
        self.scale_rows = _spread(len(scales[0]) if scales else 0, len(self.rows)).to(self.rows.device)
        nothing = torch.empty(len(layers), 0, device=self.rows.device)
        self.start_scale = torch.stack([one[self.scale_rows] for one in scales]) if scales else nothing

    def _scales(self) -> list[torch.Tensor | None]:
        """This process's share of each layer's scales; None where none are trained."""
        found = [layer._trained_scales(layer._adapters_at_work()) for layer in self.layers.values()]
        return [None if one is None else one[1].detach() for one in found]

    def _edge(self, codes: torch.Tensor) -> torch.Tensor:
        return _share((codes == self.low) | (codes == self.high))

    @torch.no_grad()
    def look(self) -> torch.Tensor:
        """`Shares` of each layer, fp32 (layers, shares) on their device; what has changed since the last look is
        remembered. Zeros for a layer whose adapter was taken away.
        """
        found = [layer.sample_codes(self.rows, layer._adapters_at_work()) for layer in self.layers.values()]
        there = [one is not None for one in found]
        codes = torch.stack([last if one is None else one[0] for one, last in zip(found, self.last, strict=True)])
        now = (codes > self.last).to(torch.int8) - (codes < self.last).to(torch.int8)
        moved = now != 0
        self.turned |= moved & (now == -self.way)
        self.way = torch.where(moved, now, self.way)
        shares = [
            _share(codes != self.start),
            _share(moved),
            _share(self.turned),
            self._edge(codes),
            self._scale_change(),
        ]
        self.last = codes
        return torch.stack(shares, 1) * torch.tensor(there, device=codes.device).unsqueeze(1)

    def _scale_change(self) -> torch.Tensor:
        if not self.start_scale.numel():
            return torch.zeros(len(self.layers), device=self.rows.device)
        # another adapter, or none, may be at work by now: one that trains no scales leaves them as they were
        found = zip(self._scales(), self.start_scale, strict=True)
        now = torch.stack([start if one is None else one[self.scale_rows] for one, start in found])
        return (now / self.start_scale - 1).abs().flatten(1).mean(1)

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        return {
            f"{name}:{part}": getattr(self, part)[place].cpu()
            for place, name in enumerate(self.layers)
            for part in self.kept
        }

    def fits(self, found: dict[str, torch.Tensor]) -> bool:
        """Whether what a checkpoint keeps is of these rows."""
        return all(key in found and found[key].shape == mine.shape for key, mine in self.state().items())

    def take(self, found: dict[str, torch.Tensor]) -> None:
        """Go on from what a checkpoint keeps."""
        for part in self.kept:
            value = getattr(self, part)
            kept = torch.stack([found[f"{name}:{part}"] for name in self.layers])
            setattr(self, part, kept.to(value.device, value.dtype))


def _spread(length: int, most: int) -> torch.Tensor:
    """At most so many places in a row of so many, evenly spaced: int64."""
    return torch.linspace(0, length - 1, min(most, length)).round().long()


def _share(of: torch.Tensor) -> torch.Tensor:
    """The share of True in each layer: fp32 (layers,)."""
    return of.flatten(1).mean(1, dtype=torch.float32)


def watch(model: Any, rows: int) -> list[_Watched]:
    """Samples of the layers that are trained, at most `_LAYERS` of a kind, evenly spaced."""
    kinds: dict[str, dict[str, MergingLayer]] = defaultdict(dict)
    for name, layer in _layers(model):
        kinds[name.rpartition(".")[2]][name] = layer
    alike: dict[Any, dict[str, MergingLayer]] = defaultdict(dict)
    for layers in kinds.values():
        names = list(layers)
        for place in _spread(len(names), _LAYERS).tolist():
            layer = layers[names[place]]
            scales = layer._trained_scales(layer._adapters_at_work())
            shape = layer.frozen.out_features, layer.frozen.in_features, None if scales is None else scales[1].shape
            alike[(*shape, layer.frozen.device)][names[place]] = layer
    return [_Watched(layers, rows) for layers in alike.values()]


@with_suggestions
class QuantizationCallback(TrainerCallback):
    """Tell what training does to the integers of a quantized model: a callback for any Trainer, and for both methods.

    At every log that has a loss (in a long training, at some of them: `time_share`), a few rows of up to eight layers
    of each kind are compared with those at the start of this training and at the last log. The Trainer's log, and so
    its trackers, gets

        qat_changed         share of the integers that are not what they were at the start
        qat_changed_last    share that has changed since the last log
        qat_reversed        share that has changed in one direction and then in the other, at least once
        qat_edge            share at the smallest or largest integer of the grid, where they can go no further
        qat_scale_change    mean of |s / s0 - 1| over the scales of as many rows

    Where only scales are trained (`LRQATConfig(r=0)`), the integers' shares stay 0, and that is no fault.

    At the end, process 0 prints a table by kind of layer, with advice where a figure is off, and writes the curves as
    `quantization.png` into the Trainer's `output_dir` if matplotlib is installed. With a teacher (`Distillation`), its
    `kl` is in both. Checkpoints keep the samples, so training that is resumed goes on counting. With FSDP2 every
    process gathers a layer's integers to look at them.

    Args:
        rows (int): how many rows of such a layer, evenly spaced; 1 or more.
        time_share (float | None): above 0 up to 1. In a training with more than 50 logs, one is left out if looking
            would take more than this share of the time since the last look. None: no log is left out.
        plot (bool): whether to write the picture.

    Raises:
        ValueError: an option is out of range; or, when training begins, the model has no quantized layer that is
            trained.

    Examples:
        >>> from peft_lrqat import LRQATConfig, QuantizationCallback
        >>> from trl import SFTConfig, SFTTrainer
        >>> trainer = SFTTrainer(
        ...     "Qwen/Qwen3-0.6B",
        ...     SFTConfig("adapter", learning_rate=1e-3, max_steps=10, logging_steps=1),
        ...     train_dataset=dataset,
        ...     peft_config=LRQATConfig(task_type="CAUSAL_LM"),
        ...     callbacks=[QuantizationCallback()],
        ... )
        >>> trainer.train()
        >>> "qat_changed" in trainer.state.log_history[0]
        True
    """

    def __init__(self, *, rows: int = 8, time_share: float | None = 0.01, plot: bool = True) -> None:
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ValueError(f"`rows` is {rows!r}; a positive integer is allowed. 8 is the default.")
        if time_share is not None and not (is_positive(time_share) and time_share <= 1):
            raise ValueError(f"`time_share` is {time_share!r}; numbers above 0 up to 1 are allowed, or None.")
        check_flags(plot=plot)
        self.rows, self.time_share, self.plot = rows, time_share, plot
        self._watched: list[_Watched] = []
        self._curves: dict[int, Shares] = {}
        self._took = self._since = 0.0
        self._short = False

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizationCallback:
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._watched = watch(model, self.rows)
        if not self._watched:
            raise ValueError(
                "`QuantizationCallback` finds no quantized layer that is trained. Train a model with LRQATConfig or "
                "LowBitSRConfig, or leave the callback out."
            )
        self._curves, self._took, self._since = {}, 0.0, time.perf_counter()
        self._short = _logs(args, state) <= _FEW_LOGS
        if state.global_step:
            self._resume(state)
        log_before_trackers(self)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not self._watched or logs is None or "loss" not in logs or self._too_soon():
            return
        began = time.perf_counter()
        shares = _mean([watched.look() for watched in self._watched])
        self._since = time.perf_counter()
        self._took = self._since - began
        self._curves[state.global_step] = shares
        logs.update(shares.logged())
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update(shares.logged())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self._watched and state.is_world_process_zero and folder.is_dir():
            # cloned: before the first log, the start is the last look
            tensors = {key: kept.clone() for watched in self._watched for key, kept in watched.state().items()}
            curves = json.dumps({step: shares._asdict() for step, shares in self._curves.items()})
            save_file(tensors, folder / _FILE, metadata={"curves": curves})

    def _resume(self, state: Any) -> None:
        """Go on counting from the checkpoint that training is resumed from."""
        path = Path(resumed_from() or "") / _FILE
        found: dict[str, torch.Tensor] = {}
        if path.is_file():
            with safe_open(path, "pt") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dictionary
                curves = json.loads((file.metadata() or {}).get("curves", "{}"))
        wanted = {f"{name}:{part}" for watched in self._watched for name in watched.layers for part in watched.kept}
        if found.keys() != wanted or not all(watched.fits(found) for watched in self._watched):
            logger.warning(
                f"`QuantizationCallback` counts from step {state.global_step} on: the checkpoint from which training "
                f"is resumed holds no samples of {self.rows} rows of these layers."
            )
            return
        for watched in self._watched:
            watched.take(found)
        self._curves = {int(step): Shares(**shares) for step, shares in curves.items()}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._watched:
            return
        kinds: dict[str, list[torch.Tensor]] = defaultdict(list)
        for watched in self._watched:
            for name, shares in zip(watched.layers, watched.look(), strict=True):
                kinds[name.rpartition(".")[2]].append(shares.unsqueeze(0))
        found = {kind: _mean(those) for kind, those in kinds.items()}
        total = _mean([one for those in kinds.values() for one in those])
        started = float(torch.cat([watched.start_edge.cpu() for watched in self._watched]).mean())
        usual = max(_USUAL[isinstance(one, LRQATLayer)] for w in self._watched for one in w.layers.values())
        moving = any(one.moves_integers(one._adapters_at_work()) for w in self._watched for one in w.layers.values())
        self._watched = []
        if state.global_step in self._curves:  # the last log looked at this very step: nothing has changed since then
            total = total._replace(changed_last=self._curves[state.global_step].changed_last)
        if state.log_history:
            state.log_history[-1].update(total.logged())
        if not state.is_world_process_zero:
            return
        hardly = few_changes(total.changed, _peak_rate(args, **kwargs), state.global_step, usual) if moving else ""
        advised = advice(total, started, hardly)
        divergence = {entry["step"]: entry["kl"] for entry in state.log_history if "kl" in entry}
        if divergence:
            first, *_, end = [*divergence.values(), *divergence.values()]
            advised.insert(0, f"KL to the teacher, a token: {first:.3g} at the first log, {end:.3g} at the last.")
        print("", table({**found, "all": total}), *advised, sep="\n")  # the empty line ends the progress bar's
        if self.plot:
            _plot({**self._curves, state.global_step: total}, divergence, Path(args.output_dir) / "quantization.png")

    def _too_soon(self) -> bool:
        if self.time_share is None or self._short:
            return False
        soon = self._took > self.time_share * (time.perf_counter() - self._since)
        if torch.distributed.is_available() and torch.distributed.is_initialized():  # all look, or none
            device = self._watched[0].start.device
            votes = torch.tensor(float(soon), device=device)
            torch.distributed.all_reduce(votes)
            soon = votes.item() > 0
        return soon


def _logs(args: Any, state: Any) -> float:
    """About how many logs a training will have."""
    if args.logging_strategy == IntervalStrategy.EPOCH:
        return math.ceil(args.num_train_epochs)
    return state.max_steps / max(state.logging_steps or args.logging_steps, 1)


def _peak_rate(args: Any, optimizer: Any = None, **kwargs: Any) -> float:
    """The largest learning rate that any group of the optimizer had, or has where no schedule noted it."""
    groups = getattr(optimizer, "param_groups", None) or []
    return max((float(group.get("initial_lr", group["lr"])) for group in groups), default=args.learning_rate)


def _mean(looked: list[torch.Tensor]) -> Shares:
    """Of the layers of several looks, each of which counts alike."""
    return Shares(*torch.cat([one.to(looked[0].device) for one in looked]).mean(0).tolist())


def _layers(model: Any) -> Iterator[tuple[str, MergingLayer]]:
    rows = torch.zeros(1, dtype=torch.int64)
    for name, layer in model.named_modules():
        if not isinstance(layer, MergingLayer) or layer.merged:
            continue
        if layer.sample_codes(rows.to(layer.frozen.device), layer._adapters_at_work()) is not None:
            yield name, layer


def table(found: dict[str, Shares]) -> str:
    """Text with a row for each kind of layer."""
    words = {"changed": "changed", "reversed": "turned back", "edge": "at an end", "scale_change": "scales changed by"}
    width = max(len(name) for name in found)
    lines = ["Integers after training:", " ".join([" " * width, *(f"{word:>18}" for word in words.values())])]
    for name, shares in found.items():
        cells = (f"{100 * getattr(shares, field):16.2f} %" for field in words)
        lines.append(" ".join([f"{name:{width}}", *cells]))
    return "\n".join(lines)


def few_changes(changed: float, rate: float, steps: int, usual: float) -> str:
    """What to do where hardly any integer has changed; nothing where that is not so.

    Args:
        changed: the share of integers that have.
        rate, steps: of the training.
        usual: the learning rate to start from.
    """
    if changed >= _HARDLY:
        return ""
    raise_it = f"the learning rate ({rate:.2g}; {usual:g} is usual), or LR-QAT's `lora_alpha` (default: 16 r)"
    if rate < usual:
        then = f"Raise {raise_it}, or train longer."
    elif steps < _MANY_STEPS:
        then = f"Train longer, some hundred steps or more. Only where that is not enough, raise {raise_it}."
    else:
        then = f"Raise {raise_it}."
    return (
        f"Only {100 * changed:.2g} % of the integers have changed in {steps} steps, so the model is nearly the rounded "
        f"one. {then}"
    )


def advice(shares: Shares, started: float, hardly: str = "") -> list[str]:
    """Sentences about figures that are off.

    Args:
        started: the share at an end of the grid when training began.
        hardly: of `few_changes`.
    """
    found = [hardly] if hardly else []
    if shares.edge > max(0.05, 2 * started):
        found.append(
            f"{100 * shares.edge:.1f} % of the integers are at an end of the grid, {100 * started:.1f} % were at the "
            "start: the range has become too small. Let the scales be trained (`learn_scales=True`), or leave room "
            "(LowBitSRConfig: `headroom`)."
        )
    if (
        shares.changed > _HARDLY
        and shares.reversed > 0.5 * shares.changed
        and shares.changed_last > 0.1 * shares.changed
    ):
        found.append(
            f"{100 * shares.reversed:.1f} % of the integers went back and forth, and {100 * shares.changed_last:.1f} % "
            "still change between two logs. Let the learning rate fall to zero at the end (`lr_scheduler_type='cosine'`"
            "), or lower it."
        )
    return found


def _plot(curves: dict[int, Shares], divergence: dict[int, float], path: Path) -> None:
    """The shares over the steps, and below them the KL to a teacher, if there was one."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("No picture of the integers is written: it needs matplotlib, %s.", how_to_install("matplotlib"))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7, 6 if divergence else 4), layout="constrained")
    axes, *below = figure.subplots(2 if divergence else 1, sharex=True, squeeze=False)[:, 0]
    for name, words in Shares.words().items():
        axes.plot(list(curves), [100 * getattr(shares, name) for shares in curves.values()], label=words, marker=".")
    axes.set_ylabel("%")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(linewidth=0.4)
    axes.legend(fontsize=8)
    for lower in below:
        lower.plot(list(divergence), list(divergence.values()), color="black", marker=".")
        lower.set_ylabel("KL to the teacher")
        lower.grid(linewidth=0.4)
    (below or [axes])[-1].set_xlabel("step")
    figure.savefig(path, dpi=150)
