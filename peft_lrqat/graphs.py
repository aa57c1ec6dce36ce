"""Training steps with little Python: a callback for any Trainer, and a context for loops of one's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import TrainerCallback

from .modules.block_graphs import BlockGraphs
from .tuners.common.parallel import announced_fsdp, announced_zero


class CudaGraphCallback(TrainerCallback):
    """Replay the blocks of a model as CUDA graphs while a Trainer trains: a callback for any Trainer.

    At one sequence a step, most of the time goes into Python. With this callback every block that gradient
    checkpointing computes again is recorded once, and then replayed: the same kernels on the same numbers, so losses
    and gradients are those of training without it. It works for adapters of this package (LR-QAT, low-bit SR), and for
    LoRA and QLoRA of PEFT. The first two steps with a shape run slower. Batches of up to 8 shapes are recorded, so pad
    to a multiple (`pad_to_multiple_of`), or pack with `packing_strategy="wrapped"`. Memory grows by about the
    activations of one block, and by the gradients of one block: with low-bit SR they are as large as its float weights.

    What cannot be replayed runs as it would without the callback, and a warning says what it was, and why: blocks that
    wait for the GPU (mixtures of experts), hooks inside a block, shapes beyond the first 8.

    Raises:
        ValueError: when training begins: gradient checkpointing is off or selective, there is dropout in a block, the
            model has `offload_base=True`, or training is spread by FSDP, DeepSpeed, nn.DataParallel or `device_map`,
            or compiled.

    Examples:
        >>> from peft_lrqat import CudaGraphCallback, LRQATConfig
        >>> from trl import SFTConfig, SFTTrainer
        >>> trainer = SFTTrainer(
        ...     "Qwen/Qwen3-0.6B",
        ...     SFTConfig("adapter", learning_rate=1e-3, max_steps=10, pad_to_multiple_of=64),
        ...     train_dataset=dataset,
        ...     peft_config=LRQATConfig(task_type="CAUSAL_LM"),
        ...     callbacks=[CudaGraphCallback()],
        ... )
        >>> trainer.train()
    """

    def __init__(self) -> None:
        self._graphs: BlockGraphs | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._end()
        _check_arguments(args)
        self._graphs = _graphs_of(model)
        self._graphs.attach()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._graphs is not None:
            self._graphs.attach()  # trainers that generate switch checkpointing off and on between steps

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self._graphs is not None:
            self._graphs.detach()
        self._graphs = None


@contextlib.contextmanager
def cuda_graphs(model: nn.Module) -> Iterator[None]:
    """Replay the checkpointed blocks of a model as CUDA graphs inside a `with` block, for a training loop of your own.

    See `CudaGraphCallback` for what that does.

    Args:
        model (nn.Module): a model of transformers, with or without adapters, on one GPU. Gradient checkpointing is on.

    Returns:
        A context manager, without a value.

    Raises:
        ValueError: gradient checkpointing is off or selective, or a block holds what a graph could not repeat.

    Examples:
        >>> from peft_lrqat import cuda_graphs
        >>> model.gradient_checkpointing_enable()
        >>> model = model.train()
        >>> with cuda_graphs(model):
        ...     for text in texts[:4]:
        ...         ids = tokenizer(text, return_tensors="pt")["input_ids"]
        ...         model(input_ids=ids, labels=ids).loss.backward()
    """
    graphs = _graphs_of(model)
    graphs.attach()
    try:
        yield
    finally:
        graphs.detach()


def _graphs_of(model: Any) -> BlockGraphs:
    """Raises ValueError where a model, or how it is trained, does not go with graphs."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` is {model!r:.80}; it must be a model of transformers, with or without adapters.")
    if announced_fsdp() is not None or announced_zero() is not None:
        raise ValueError(
            "CUDA graphs do not go with FSDP and DeepSpeed, which gather parameters in Python when a block is called. "
            "Use plain data parallelism (`torchrun --nproc-per-node N script.py`), or leave the graphs out."
        )
    adapted: Any = next(
        (module for module in model.modules() if hasattr(module, "peft_config")), None
    )  # DDP may be around it
    for name, config in adapted.peft_config.items() if adapted is not None else ():
        if getattr(config, "offload_base", False):
            raise ValueError(
                f"Adapter {name!r} has `offload_base=True`, whose copies from the CPU's memory a CUDA graph would "
                "repeat out of turn. Leave one of the two out."
            )
    return BlockGraphs(model)


def _check_arguments(args: Any) -> None:
    """Refuse what a Trainer's arguments say does not go with graphs."""
    if args.n_gpu > 1:
        raise ValueError(
            "CUDA graphs do not go with `nn.DataParallel`, which the Trainer uses as several GPUs are visible to one "
            "process. Use `accelerate launch`, or make one visible with CUDA_VISIBLE_DEVICES."
        )
    if args.torch_compile:
        raise ValueError("CUDA graphs do not go with `torch_compile=True`. Leave one of the two out.")
