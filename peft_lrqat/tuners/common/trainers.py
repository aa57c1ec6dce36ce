"""What callbacks and models of this package need to know of the Trainer that calls them, and are not told."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from ...modules.packed import MERGED
from .frozen import FrozenWeight
from .layer import MergingLayer


def log_before_trackers(callback: TrainerCallback) -> None:
    """Move a callback before the trackers of its Trainer, so that they read what it adds to the log.

    Call it in one of the callback's own events. The callback stays behind the one that decides when to log. A Trainer
    hands nobody its list of callbacks, so it is found in the caller. If anybody else calls it, nothing happens.
    """
    frame = sys._getframe(1)
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            decides = [isinstance(other, DefaultFlowCallback) for other in handler.callbacks]
            place = decides.index(True) + 1 if any(decides) else 0
            if place < handler.callbacks.index(callback):
                # the handler walks through this list: those behind keep their places
                handler.callbacks.remove(callback)
                handler.callbacks.insert(place, callback)
            return
        frame = frame.f_back  # type: ignore[assignment]


def calling_trainer() -> Any:
    """The Trainer, of transformers or a subclass, that calls the caller, directly or not; None: none does."""
    module: Any = sys.modules.get("transformers.trainer")
    return next((one for name, one in _of_trainers() if name == "self" and isinstance(one, module.Trainer)), None)


def check_trained(tuner: nn.Module) -> None:
    """Raise ValueError if the Trainer that calls the caller trains this model, and nothing of it would change.

    PyTorch would say in backward that there is no gradient; with gradient checkpointing, nobody would say a word.
    """
    layer = next((module for module in tuner.modules() if isinstance(module, MergingLayer)), None)
    merged = layer is None or layer.merged
    if not merged and any(parameter.requires_grad for parameter in tuner.parameters()):
        return
    trainer = calling_trainer()
    if trainer is None or not trainer.is_in_train or not any(module is tuner for module in trainer.model.modules()):
        return
    if layer is not None and layer.merged:
        raise ValueError(
            f"Nothing of the adapters {layer.merged_adapters} would be trained: they are merged. Call "
            "`model.unmerge_adapter()` before."
        )
    if any(parameter.requires_grad for parameter in trainer.model.parameters()):
        return
    if layer is None:
        raise ValueError(
            "Nothing of the model would be trained: its adapters were merged (`merge_and_unload`) or unloaded. Begin a "
            "new training with a new adapter, or load the saved one, with `is_trainable=True`, on the float model."
        )
    raise ValueError(
        "Nothing of the model would be trained: none of its parameters requires gradients. To go on with an adapter, "
        "load it with `is_trainable=True` (`PeftModel.from_pretrained(model, folder, is_trainable=True)`); "
        "`model.set_adapter(name)` makes one trainable that is there already."
    )


def _look(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """Say so where a Trainer trains a quantized model without an adapter. torch calls it before all optimizers' steps.

    Raises:
        ValueError: nothing at all is trained, as after `merge_and_unload()`, which leaves everything frozen.
    """
    if optimizer in _SEEN:
        return
    _SEEN.add(optimizer)
    trainer = calling_trainer()
    modules = [] if trainer is None else list(trainer.model.modules())
    layers = sum(isinstance(module, (*MERGED, FrozenWeight)) for module in modules)
    if not layers or any(isinstance(module, (PeftModel, BaseTunerLayer)) for module in modules):
        return
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    how = (
        "To train its integers, give the trainer `peft_config=LRQATConfig(...)`, or the model with an adapter "
        "(`get_peft_model`)"
    )
    if not trained:
        raise ValueError(
            f"Nothing is trained: the model has {layers} quantized layers, and is frozen altogether. {how}."
        )
    warnings.warn(
        f"The integers of the {layers} quantized layers stay as they are: only {len(trained)} float tensors are "
        f"trained, such as {trained[0]!r}. {how}.",
        stacklevel=2,
    )


#: Optimizers that were looked at.
_SEEN: WeakSet[Optimizer] = WeakSet()
register_optimizer_step_pre_hook(_look)


def resumed_from() -> str | None:
    """The checkpoint from which the Trainer that calls the caller has resumed; None: from none."""
    return next((one for name, one in _of_trainers() if name == "resume_from_checkpoint" and one), None)


def _of_trainers() -> Iterator[tuple[str, Any]]:
    """The variables of the methods of transformers' Trainer that are running, from the innermost on.

    Only its own frames are looked into: looking at a user's function would keep that function's variables.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.trainer":
            yield from frame.f_locals.items()
        frame = frame.f_back
