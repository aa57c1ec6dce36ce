"""What `LowBitAdamW` takes of a Trainer's arguments, which transformers passes to no optimizer of the user's own."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import ParallelMode

_LOGGER = logging.getLogger("peft_lrqat")


def options_of(args: TrainingArguments, options: dict[str, Any]) -> dict[str, Any]:
    """Complete LowBitAdamW's options by a Trainer's arguments: `LowBitAdamW.for_trainer` says how."""
    if not isinstance(args, TrainingArguments):
        raise ValueError(
            f"`args` is {type(args).__name__}; it must be the arguments of the Trainer: TrainingArguments, SFTConfig, "
            "DPOConfig or another of their kind."
        )
    found: dict[str, Any] = {"lr": args.learning_rate, "eps": args.adam_epsilon}
    usual = _defaults(args)
    betas = {"adam_beta1": args.adam_beta1, "adam_beta2": args.adam_beta2}
    if any(value != usual[name] for name, value in betas.items()):  # somebody has chosen them
        found["betas"] = tuple(betas.values())
    # torchrun has one process, too, wrapped by DistributedDataParallel, which copies every gradient
    found["fused_backward"] = args.world_size == 1 and args.parallel_mode != ParallelMode.DISTRIBUTED
    return found | options


def end_clipping(args: TrainingArguments, options: dict[str, Any]) -> None:
    """Set `max_grad_norm` of a Trainer's arguments to 0 where `options_of` them update weights in backward.

    Raises:
        ValueError: somebody has asked for clipping.
    """
    if options["fused_backward"] and args.max_grad_norm:
        if args.max_grad_norm != _defaults(args)["max_grad_norm"]:
            raise ValueError(
                f"`max_grad_norm` of the arguments is {args.max_grad_norm}, but with `fused_backward=True` no gradient "
                "waits to be clipped by the norm of all. Set `max_grad_norm=0` in the arguments, or "
                "`fused_backward=False` here, which takes 4 bytes more a weight."
            )
        args.max_grad_norm = 0.0
        _LOGGER.info(
            "Low-bit SR: weights are updated in backward, so gradients are not clipped: `max_grad_norm` of the "
            "Trainer's arguments is 0 now."
        )


def _defaults(args: TrainingArguments) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(args)}
