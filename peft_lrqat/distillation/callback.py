"""`Distillation`: the callback that gives a Trainer's model the probabilities of a teacher to learn from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import TrainerCallback

from ..arguments import with_suggestions
from ..tuners.common import loss as lean
from ..tuners.common.trainers import log_before_trackers
from .loss import TokenLosses, TopK, check_options, token_losses
from .segments import without_padding
from .sft import fused_output
from .stored import MANIFEST, StoredLogits
from .teacher import ModelTeacher, causal_lm, check_keep, check_teacher, load_teacher, named_inputs

# Which callback a causal language model learns from at the moment
_active: WeakKeyDictionary[nn.Module, Distillation] = WeakKeyDictionary()

_TWICE = (
    "The model was called again, with gradients, in one step of training; `Distillation` takes part in the first call "
    "only. Compute `peft_lrqat.distillation_loss` in the Trainer's `compute_loss`."
)


class _Call(NamedTuple):
    """What is known of a forward before it begins."""

    teacher: torch.Tensor | TopK
    targets: torch.Tensor
    """(batch * tokens,): what is predicted in each row of the logits; -100 where it does not count."""
    share: torch.Tensor
    """how many labels the Trainer counts for each of `targets` that counts: above 1 with padding on the left only."""
    fused: bool
    """whether TRL asked for its fused output layer, and reads the losses of single tokens from the output."""
    loss_function: Any
    """the model's own."""


@with_suggestions
class Distillation(TrainerCallback):
    """Let a Trainer's model learn from the probabilities of a teacher: a callback for transformers' Trainer and TRL's
    SFTTrainer, with any causal language model.

    While the Trainer trains, the loss is `weight * temperature ** 2 * KL(teacher || student) + (1 - weight) *
    cross-entropy` over the tokens whose label counts. It is divided as the Trainer divides the model's own loss, so
    packing, completions only, accumulated gradients and several processes work as without it. Evaluation is left alone:
    `eval_loss` is the cross-entropy. The mean KL a token is logged as `kl`, for trackers too.

    The teacher reads what the student reads, in eval mode, under the student's autocast, in every process. Its logits
    of a whole micro-batch, (batch, tokens, vocabulary) in the teacher's dtype, exist beside the student's. Stored
    logits take no second model and no such memory.

    Args:
        teacher (str | os.PathLike | nn.Module): a model of transformers with the student's vocabulary, or its name or
            folder, which is loaded in the student's dtype on its device when training begins. The model before
            quantization helps most. Or a folder that `store_logits` wrote.
        weight (float): of the teacher, from 0 to 1. The model's own loss has the rest.
        temperature (float): of both distributions, above 0.
        keep (str | None): how a teacher that is given by name is kept. None: as it is. "int8": its linear layers in 8
            bits, which takes a little more than half of bf16's memory. "cpu": in the CPU's memory, and one layer at a
            time on the device, which is slow.

    Raises:
        ValueError: an option is out of range. Also when training begins, or in its first forward, before any weight
            changes: the teacher is the student or has another vocabulary; or the model does not compute the loss (label
            smoothing, `compute_loss_func`, Liger's fused loss, TRL's `loss_type` "dft" and "chunked_nll").

    Examples:
        >>> from peft_lrqat import Distillation, LRQATConfig
        >>> from trl import SFTConfig, SFTTrainer
        >>> trainer = SFTTrainer(
        ...     "Qwen/Qwen3-0.6B",
        ...     SFTConfig("adapter", learning_rate=1e-3, max_steps=10),
        ...     train_dataset=dataset,
        ...     peft_config=LRQATConfig(task_type="CAUSAL_LM"),
        ...     callbacks=[Distillation("Qwen/Qwen3-0.6B")],
        ... )
        >>> trainer.train()
    """

    def __init__(
        self,
        teacher: str | os.PathLike | nn.Module,
        *,
        weight: float = 1.0,
        temperature: float = 1.0,
        keep: str | None = None,
    ) -> None:
        check_options(temperature, weight)
        check_teacher(teacher)
        check_keep(keep, teacher)
        self.teacher, self.weight, self.temperature, self.keep = teacher, weight, temperature, keep
        self._student: Any = None
        self._source: Any = None
        self._handles: list[Any] = []
        self._state: Any = None
        self._armed = False
        self._pending = False  # a loss was returned that backward has not reached yet
        self._extra = 0
        self._call: _Call | None = None
        self._losses: TokenLosses | None = None
        self._kl: torch.Tensor | None = None
        self._logged: float | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Distillation:
        return self  # a copy of the student, hooks and all, is not to copy the teacher

    # -- what the Trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._state is not None and self._state is not state and _called_by_trainer_of(self._state):
            raise ValueError(
                "This `Distillation` takes part in a training that is still running, and another begins inside it. "
                "Give each its own."
            )
        self.remove()
        log_before_trackers(self)
        _check_arguments(args)
        student = causal_lm(model)
        other = _active.get(student)
        if other is not None and other._state is state:
            raise ValueError("The Trainer has two `Distillation` callbacks. Give it one.")
        if other is not None:  # of a training that failed
            other.remove()
        self._source = self._find_teacher(student)
        self._student, self._state, self._kl = student, state, None
        _active[student] = self
        self._handles = [
            student.register_forward_pre_hook(self._before, with_kwargs=True),
            student.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._armed, self._pending, self._extra = True, False, 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check_calls()
        self._armed = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check_calls()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._gather(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._gather(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._logged is None or logs is None or "loss" not in logs:
            return
        logs["kl"], self._logged = self._logged, None
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1]["kl"] = logs["kl"]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model its own loss back, and let go of a teacher that was loaded.

        The end of training does so. After an exception in training the model has its own loss by itself; this frees the
        teacher.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._restore()
        if self._student is not None:
            _active.pop(self._student, None)
        if self._source is not None:
            self._source.release()
        self._student = self._source = self._state = None
        self._armed = self._pending = False

    # -- what the model calls

    @torch.compiler.disable
    def _before(self, student: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._restore()
        if student is not self._student or not student.training or not torch.is_grad_enabled():
            return None
        if self._pending:
            raise ValueError(_TWICE + " (After a training that failed: call `remove()` of the callback.)")
        if not self._armed:  # after a training that failed; or a second forward and backward in a step
            self._extra += 1
            return None
        if not _called_by_trainer_of(self._state):  # the training failed before its forward, and this is another
            return None
        self._armed = False
        inputs = named_inputs(student, args, kwargs)
        fused = bool(inputs.pop("fused_lm_head", False))
        labels, shift_labels = inputs.get("labels"), inputs.get("shift_labels")
        given = labels if shift_labels is None else shift_labels
        if given is None:
            raise ValueError(
                "The model is called without labels, so its loss is computed elsewhere (`compute_loss_func`, label "
                "smoothing, or a Trainer with a loss of its own), and `Distillation` cannot take part. Leave that out, "
                "or compute `peft_lrqat.distillation_loss` there."
            )
        counted = lean.shifted(given, shift_labels, -100).view(given.shape)
        targets = without_padding(inputs, counted)
        share = (counted != -100).sum() / (targets != -100).sum().clamp(min=1)
        teacher = self._source.targets(inputs, targets)
        self._call = _Call(teacher, targets.flatten(), share, fused, student.__dict__.get("_loss_function"))
        student.loss_function = self._loss
        return (), {**inputs, "fused_lm_head": False} if fused else inputs

    @torch.compiler.disable
    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The loss, in the place of `causal_lm_loss`."""
        assert self._call is not None
        teacher, targets = self._call.teacher, self._call.targets.to(logits.device)
        if not isinstance(teacher, TopK):
            teacher = teacher.reshape(-1, teacher.shape[-1])
        rows = logits.reshape(-1, vocab_size)
        # a model of the user's may hold on to what it returned
        overwrite = not isinstance(self.teacher, nn.Module)
        self._losses = token_losses(rows, targets, teacher, self.temperature, self.weight, overwrite=overwrite)
        if self._losses.loss.requires_grad:
            self._pending = True
            self._losses.loss.register_hook(self._reached)
        with torch.no_grad():
            total = torch.stack([self._losses.kl.sum(), (targets != -100).sum().float()])
            self._kl = total if self._kl is None else self._kl + total
        if num_items_in_batch is None:
            return lean.divided(self._losses.loss.sum(), targets, None, -100)
        # what is divided by counts first tokens, which padding on the left would predict: they take the others' mean
        total = self._losses.loss.sum() * self._call.share.to(logits.device)
        return lean.divided(total, targets, num_items_in_batch, -100)

    @torch.compiler.disable
    def _after(self, student: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call, losses = self._call, self._losses
        self._restore()
        if call is None or output is None:  # no step of training; or the forward raised
            return None
        if losses is None:
            raise ValueError(
                f"The forward of {type(student).__name__} computes its loss without the model's `loss_function` (a "
                "fused loss of Liger, or a loss of its own), so `Distillation` cannot take part. Set "
                "`use_liger_kernel=False`; for other models, compute `peft_lrqat.distillation_loss` in a Trainer's "
                "`compute_loss`."
            )
        if not call.fused:
            return None
        counted = losses.loss * call.share.to(losses.loss.device)  # TRL sums, and divides by what it counts
        return fused_output(output, losses._replace(loss=counted), call.targets)

    def _reached(self, grad: torch.Tensor) -> None:
        self._pending = False

    # -- the rest

    def _gather(self, control: Any) -> None:
        """The mean over all processes, when the Trainer is about to log, which it decides alike in all of them."""
        if not control.should_log or self._kl is None:
            return
        total, self._kl = self._kl, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        self._logged = (total[0] / total[1].clamp(min=1)).item()

    def _restore(self) -> None:
        """Give the model its own loss back, and forget the last forward."""
        if self._call is not None and self._student is not None:
            if self._call.loss_function is None:
                self._student.__dict__.pop("_loss_function", None)
            else:
                self._student.loss_function = self._call.loss_function
        self._call = self._losses = None

    def _check_calls(self) -> None:
        """Raise ValueError, before the weights change, unless exactly one forward took part."""
        if self._extra:
            raise ValueError(_TWICE)
        if self._armed:
            raise ValueError(
                f"A step of training did not call the {type(self._student).__name__} that the Trainer holds, so "
                "`Distillation` could not take part. Compute `peft_lrqat.distillation_loss` in the Trainer's "
                "`compute_loss`."
            )

    def _find_teacher(self, student: Any) -> Any:
        if isinstance(self.teacher, nn.Module):
            return ModelTeacher(self.teacher, student)
        if (Path(self.teacher) / MANIFEST).is_file():
            if self.keep is not None:
                raise ValueError(f"`keep={self.keep!r}` is for a model, and {str(self.teacher)!r} holds stored logits.")
            return StoredLogits(self.teacher, student, self.temperature)
        if Path(self.teacher).is_dir() and not (Path(self.teacher) / "config.json").is_file():
            raise ValueError(
                f"The teacher {str(self.teacher)!r} is a folder without config.json and without stored logits. Name a "
                "model (an adapter's is the one it belongs to, or merge it first), or call `store_logits` before."
            )
        return ModelTeacher(load_teacher(self.teacher, student, self.keep), student)


def _called_by_trainer_of(state: Any) -> bool:
    """Whether a Trainer with this state is what calls the model.

    A callback is told when a step begins, and not when an exception ends the training, so that alone says who calls.
    If it were ever wrong, `_check_calls` stops the training before the step.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if getattr(frame.f_locals.get("self"), "state", None) is state:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _check_arguments(args: Any) -> None:
    """Refuse what a Trainer's arguments say would go past the model's loss."""
    if args.label_smoothing_factor:
        raise ValueError(
            f"`label_smoothing_factor={args.label_smoothing_factor}` replaces the model's loss, and the teacher's "
            "probabilities are what it stands in for. Set it to 0."
        )
    kind = getattr(args, "loss_type", None)  # "chunked_nll" is the default of TRL 1.4 to 1.12
    if kind in ("dft", "chunked_nll"):
        raise ValueError(f"TRL's `loss_type={kind!r}` makes another loss than the model's. Use `loss_type='nll'`.")
    if kind not in (None, "nll"):
        raise ValueError(
            f"The trainer of a {type(args).__name__} has a loss of its own (`loss_type={kind!r}`), and `Distillation` "
            "stands in for that of next tokens. Take it in SFTTrainer or transformers' Trainer before, and leave it "
            "out here."
        )
    if args.n_gpu > 1:
        raise ValueError(
            "`Distillation` does not go with `nn.DataParallel`, which the Trainer uses as several GPUs are visible to "
            "one process. Use `accelerate launch`, or make one visible with CUDA_VISIBLE_DEVICES."
        )
