"""What Trainers have done to a model, for the cards of its adapters and of what they are merged into.

A model is not told who trains it, and a Trainer writes its log into a state that it replaces with the next training. So
the model keeps the states, as they are: small, and without the Trainer.
"""

from __future__ import annotations

import functools
import math
import re
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.adapter_card import write_adapter_card
from ...formats.record import DATASET
from .trainers import calling_trainer


@dataclass
class Run:
    """One training, or an evaluation before it.

    Attributes:
        trainer: the name of its class.
        adapters: those that were active.
        state: the Trainer's, which changes while it trains.
        best: whether the Trainer loads its best checkpoint when it has trained.
        cross_entropy: whether its loss is the mean cross-entropy of tokens.
        dataset: a repository of the Hub, None if unknown.
    """

    trainer: str
    adapters: tuple[str, ...]
    state: Any
    best: bool
    cross_entropy: bool
    dataset: str | None


def remember_run(tuner: Any) -> None:
    """Keep the log of the Trainer that trains or evaluates this model at the moment, and complete its cards."""
    trainer = calling_trainer()
    if trainer is None or any(run.state is trainer.state for run in tuner.runs):
        return
    if not any(module is tuner for module in trainer.model.modules()):  # a teacher, or another's reference
        return
    args = trainer.args
    run = Run(
        type(trainer).__name__,
        tuple(tuner.active_adapters),
        trainer.state,
        bool(args.load_best_model_at_end),
        _is_cross_entropy(trainer),
        _repository(trainer.train_dataset),
    )
    tuner.runs.append(run)
    _keep_cards_complete(trainer, tuner)


def trainings_of(runs: Iterable[Run], adapters: Sequence[str]) -> list[dict[str, str]]:
    """What is said of each training of these adapters, as `formats.record.Record` has it."""
    own = [run for run in runs if set(run.adapters) & set(adapters)]
    found = []
    for run in own:
        if not run.state.global_step:
            continue
        before = own[own.index(run) - 1] if own.index(run) else None
        start = _evaluations(before.state.log_history)[-1:] if before and not before.state.global_step else []
        said = {"training": _training(run)}
        if measured := _evaluation(run, start):
            said["evaluation"] = measured
        if moved := [entry for entry in run.state.log_history if "qat_changed" in entry]:
            said["integers"] = f"{100 * moved[-1]['qat_changed']:.3g} % changed after step {moved[-1]['step']}"
        if run.dataset:
            said[DATASET] = run.dataset
        found.append(said)
    return found


def note_trainings(config: Any, runs: Iterable[Run], adapter: str) -> None:
    """Write to a configuration what was done to its adapter: before it was loaded, and since."""
    config.trainings = [*config._earlier_trainings, *trainings_of(runs, [adapter])] or None


def _training(run: Run) -> str:
    state = run.state
    of = f" of {state.max_steps}" if state.global_step < state.max_steps else ""
    said = [f"{run.trainer}, {state.global_step}{of} steps"]
    if run.dataset:
        said.append(f"on [{run.dataset}](https://huggingface.co/datasets/{run.dataset})")
    if losses := [entry["loss"] for entry in state.log_history if "loss" in entry]:
        said.append(f"last logged loss {losses[-1]:.4g}")
    return ", ".join(said)


def _evaluation(run: Run, start: list[tuple[int, float]]) -> str:
    """The loss before training, if that was evaluated, and the last of training; "" without the latter.

    Args:
        start: evaluations before training.
    """
    during, after = _split_at_end(run.state.log_history)
    found = [*start, *_evaluations(during), *_evaluations(after)]
    if not found or not found[-1][0]:
        return ""
    step, loss = found[-1]
    said = [f"loss {_loss(run, found[0][1])} before training"] if not found[0][0] else []
    best = run.state.best_global_step if run.best and after else None  # which is what is loaded at the end
    if best is not None:
        loss = (_evaluations(after) or [one for one in found if one[0] == best] or found)[-1][1]
        return ", ".join([*said, f"loss {_loss(run, loss)} of the best checkpoint, step {best}"])
    return ", ".join([*said, f"loss {_loss(run, loss)} after step {step}"])


def _split_at_end(history: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What was logged before and after training ended: the latter begins with what a Trainer logs at its end."""
    ends = [i for i, entry in enumerate(history) if "train_runtime" in entry]
    ended = bool(ends) and not any("loss" in entry for entry in history[ends[-1] :])
    return (history[: ends[-1]], history[ends[-1] :]) if ended else (history, [])


def _evaluations(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, loss) as logged."""
    return [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]


def _loss(run: Run, loss: float) -> str:
    return f"{loss:.4g}" + (f" (perplexity {math.exp(loss):.4g})" if run.cross_entropy and loss < 20 else "")


def _is_cross_entropy(trainer: Any) -> bool:
    """Whether `eval_loss` is what a causal language model itself computes."""
    own = next((kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind)), None)
    known = own is not None and own.__name__ in ("Trainer", "SFTTrainer")
    plain = getattr(trainer, "compute_loss_func", None) is None and not trainer.args.label_smoothing_factor
    named = getattr(trainer.args, "loss_type", "nll") in (None, "nll", "chunked_nll")
    causal = type(trainer.model).__name__.endswith("ForCausalLM")
    return known and plain and named and causal


def _repository(dataset: Any) -> str | None:
    """Where a data set of the Hub comes from, as `datasets` has noted it; what was made of it says so, too."""
    files = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = {match[1] for file in files if (match := re.match(r"hf://datasets/([^/@]+/[^/@]+)", str(file)))}
    return found.pop() if len(found) == 1 else None


def _keep_cards_complete(trainer: Any, tuner: Any) -> None:
    """Have the model cards that a Trainer writes say how to load the adapter: they replace the one that PEFT wrote."""
    if "create_model_card" in vars(trainer):
        return
    # a Trainer that is let go of frees its memory at once; and its model may be a module around PEFT's
    references = weakref.ref(trainer), weakref.ref(tuner)

    @functools.wraps(type(trainer).create_model_card)
    def create_model_card(*args: Any, **kwargs: Any) -> None:
        trainer, tuner = (reference() for reference in references)
        assert trainer is not None
        type(trainer).create_model_card(trainer, *args, **kwargs)
        folder = Path(trainer.args.output_dir)
        if tuner is None or not trainer.is_world_process_zero() or not (folder / "README.md").exists():
            return
        for name, config in tuner.peft_config.items():
            note_trainings(config, tuner.runs, name)
            place = folder if name == "default" else folder / name
            write_adapter_card(place, config.facts(), name, trainer.hub_model_id)

    trainer.create_model_card = create_model_card
