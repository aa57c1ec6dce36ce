"""What a checkpoint is written from: codes, scales and zero points, one layer at a time, and every other tensor.

An exporter reads a `Source` and nothing else, so that no format is ever written from dequantized floats. What makes one
of a model or a folder is `checkpoint/open.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..grid import Grid, GridTensor
from ..ops.activations import Activations
from ..ops.kv_cache import CacheRounding

__all__ = ["GridTensor", "LayerInfo", "Loading", "Source"]


@dataclass(frozen=True)
class LayerInfo:
    """What is known of a quantized weight without touching it.

    Attributes:
        out_features, in_features: shape of the codes; for an embedding, table rows and width.
        grid: the trained grid. (A folder that does not record it: the grid of the container.)
        kind: what the module is. The state dict holds a Conv1D's weight as (in, out).
        bias: whether the module has one; it is among `Source.floats()`.
        dtype: of the model, in which the merged checkpoint stores scales.
        container_bits: width of the codes that the training configuration, or the folder, gives the merged checkpoint.
        activations: how inputs are rounded, None: not at all.
    """

    out_features: int
    in_features: int
    grid: Grid
    kind: Literal["linear", "conv1d", "embedding"]
    bias: bool
    dtype: torch.dtype
    container_bits: int
    activations: Activations | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Loading:
    """What transformers does with an architecture while it loads a checkpoint (`modules/architecture.py` finds out).

    Attributes:
        early: it reads weights before the model's first forward, or the model is used in other ways than its forward.
        joins: it joins some float tensors of a file into one, as the experts of a mixture.
        cuts: it cuts a tensor of this name into several; "" if it does not.
        experts: the model holds float experts in one tensor each, which are modules for other engines.
        packed_experts: it holds experts so in other layers, or in all, that are quantized in the file.
        joined: name of a float tensor in the model, of no expert, that it joins; "" if there is none.
        replaced: class of modules that it replaces in checkpoints of compressed-tensors; "" if there are none.
    """

    early: bool = False
    joins: bool = False
    cuts: str = ""
    experts: bool = False
    packed_experts: bool = False
    joined: str = ""
    replaced: str = ""


class Source(ABC):
    """What an exporter reads. Modules and tensors have the names that files of the architecture give them.

    Attributes:
        config: the model's configuration, a copy, with `architectures` and `dtype`, without `quantization_config`.
        generation_config: a `GenerationConfig`, or None.
        origin: a few words for messages and model cards: a path, or a base model's name.
        recipe: how it was trained, in plain text, or None if unknown.
        base: what the base model is called (`Record`), or None if unknown.
        trainings: what Trainers have done, as `Record` has it.
        scale_dtype: what the scales were trained to be exact in ("auto": bf16 and fp16), or None if unknown.
        fixed_point_bits: of the grid that LR-QAT is to take for 8-bit codes with a fraction (`Record`), or None.
        cache: how keys and values are rounded, None: they are not.
        float_linears: names of the modules that are not quantized and that an engine may take for linear layers; where
            the model has another name than the file, both.
        modules: name of a quantized module in the file -> in the model, where they differ.
        loading: what transformers does with the architecture.
        tied: state-dict names that share storage with another tensor and are not written: alias -> name.
        tokenizer: folder from which the tokenizer can be loaded, or None.
    """

    config: Any
    generation_config: Any = None
    origin: str = ""
    recipe: str | None = None
    base: str | None = None
    trainings: Sequence[Mapping[str, str]] = ()
    scale_dtype: str | None = None
    fixed_point_bits: int | None = None
    cache: CacheRounding | None = None
    float_linears: list[str]
    modules: Mapping[str, str]
    loading: Loading = Loading()
    tied: dict[str, str]
    tokenizer: str | None = None

    def activations(self) -> set[Activations | None]:
        """How the inputs of linear layers are rounded; None among them: some are floats."""
        return {info.activations for info in self.grids().values() if info.kind == "linear"}

    @property
    def act_bits(self) -> list[int]:
        """To how many bits the inputs of some layers are rounded; empty: all are floats."""
        return sorted({how.bits for how in self.activations() if how is not None})

    @abstractmethod
    def grids(self) -> dict[str, LayerInfo]:
        """Module name -> what it is, for every quantized weight, in the model's order. Touches no weight."""

    @abstractmethod
    def layer(self, name: str) -> GridTensor:
        """The codes, scale and zero point of one of `grids()`. Built or read anew; owned by the caller."""

    def scale(self, name: str) -> torch.Tensor:
        """The scale of `layer(name)`, fp32 (rows, groups), without its codes."""
        return self.layer(name).scale

    def zero_point(self, name: str) -> torch.Tensor | None:
        """The zero points of `layer(name)`, int8 (rows, groups), without its codes; None on a symmetric grid."""
        return None if self.grids()[name].grid.symmetric else self.layer(name).zero_point

    def save_code(self, folder: Path, config: Any) -> None:  # noqa: B027  # most models have none
        """Write the Python files that define the model, if they are not transformers', and name them in `config`."""

    @abstractmethod
    def floats(self, packed: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """(state-dict name, tensor) of everything else, in the model's dtype, one at a time.

        Args:
            packed: the modules of `grids()` that the format holds as codes. The weights of the others come out here,
                as floats that lie on their grid.
        """
