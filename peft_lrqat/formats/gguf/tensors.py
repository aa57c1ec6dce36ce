"""A model's tensors as the file has them: under llama.cpp's names, with rows in its order, in one of ggml's types."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ...grid import GridTensor
from . import architectures, choice, latent

_OUTER = ("token_embd.weight", "output.weight")  # what `embedding_type` is about
_GATE = ".ffn_gate_inp_shexp.weight"  # how much of the shared expert is taken
#: What chooses among experts, float32 in every file: nothing is rounded where a little decides.
ROUTERS = (".ffn_gate_inp.weight", _GATE)
_BIAS = ".gate.e_score_correction_bias"  # a parameter of its own in transformers, a module's bias for `gguf`
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.([^.]+\.weight)")


@dataclass(frozen=True)
class Place:
    """Where a tensor of the state dict is in the file.

    Attributes:
        tensor: a tensor of the file.
        expert: which of its matrices, if it holds one of each expert; None: all of it.
    """

    tensor: str
    expert: int | None = None


def places(config: Any) -> Callable[[str], Place]:
    """A function from names in the state dict to places in the file; raises ValueError for tensors without one."""
    arch = architectures.ARCHITECTURES[config.model_type].name
    table = _names(arch, config.num_hidden_layers)

    def place(name: str) -> Place:
        name = name.replace(_BIAS, ".gate.e_score_correction.bias")
        one = _EXPERT.fullmatch(name)
        found = table.get_name(f"{one[1]}.{one[3]}" if one else name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"llama.cpp's architecture {arch!r} has no place for the tensor {name!r}.")
        return Place(found, int(one[2]) if one else None)

    return place


@cache
def _names(arch: str, layers: int) -> Any:
    """llama.cpp's names of an architecture's tensors; made once, because that takes long for many layers."""
    import gguf

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return gguf.get_tensor_name_map(number, layers)


def matrices(names: Iterable[str], config: Any) -> dict[str, list[str]]:
    """Tensor of the file -> the modules whose weights it holds: one, or one for each expert, in order.

    Raises:
        ValueError: a module has no place, or a tensor would hold the weights of some experts only.
    """
    place, found = places(config), dict[str, dict[int | None, str]]()
    for name in names:
        there = place(name + ".weight")
        found.setdefault(there.tensor, {})[there.expert] = name
    count = architectures.experts(config)
    for tensor, modules in found.items():
        if None not in modules and modules.keys() != set(range(count)):
            first = next(iter(modules.values()))
            raise ValueError(
                f"GGUF holds all {count} experts of a layer in one tensor, and only {len(modules)} of {tensor!r} are "
                f"quantized, e.g. {first!r}."
            )
    return {
        tensor: [modules[key] for key in sorted(modules, key=lambda e: e or 0)] for tensor, modules in found.items()
    }


def file_shape(tensor: str, *shape: int) -> tuple[int, ...]:
    """The shape of a tensor in the file, as PyTorch counts, from that of a module's weight."""
    return shape[1:] if tensor.endswith(_GATE) else shape  # a vector; transformers' reader wants one, too


def in_file_order(tensor: GridTensor, config: Any, name: str) -> GridTensor:
    """A module's weight with its rows in the file's order, on the CPU."""
    zero_point = None if tensor.zero_point is None else tensor.zero_point.cpu()
    tensor = GridTensor(tensor.codes.cpu(), tensor.scale.cpu(), zero_point, tensor.grid)
    order = architectures.row_order(config, name)
    return tensor if order is None else choice.rows_of(tensor, order)


def float_pieces(
    name: str, weight: torch.Tensor, config: Any, grids: Collection[str]
) -> Iterator[tuple[Place, torch.Tensor]]:
    """A tensor that is on no grid, as the file has it: where, and with which rows and numbers; in two where llama.cpp
    wants it so, and nowhere if it is of a layer that the model does not run: those that predict more tokens.

    Args:
        name: in the state dict.
        grids: names of the modules that are on a grid.
    """
    layer = _LAYER.match(name)
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return
    parts: Iterable[tuple[str, torch.Tensor]] = [(name, weight)]
    if architectures.ARCHITECTURES[config.model_type].latent and latent.splits(grids):
        parts = latent.pieces(name, weight, config)
    place = places(config)
    for part, values in parts:
        yield place(part), _in_file_order(part, values, place(part), config)


def _in_file_order(name: str, weight: torch.Tensor, place: Place, config: Any) -> torch.Tensor:
    module = name.rpartition(".")[0]
    order = architectures.row_order(config, module)
    if order is not None:
        weight = weight.cpu()[order]
    weight = weight.reshape(file_shape(place.tensor, *weight.shape))
    if weight.dim() == 1 and module.endswith("norm"):
        weight = weight.float() + architectures.ARCHITECTURES[config.model_type].norm_offset
    return weight


def float_type(place: Place, weight: torch.Tensor, type: str, embedding_type: str) -> str:
    """What a tensor that is on no grid is stored as, see `floats.store`. Norms, biases, and what chooses among experts
    are float32 in every file, as llama.cpp wants them.

    Args:
        type: what is asked for quantized layers; "f32" makes everything float32.
        embedding_type: what is asked for embeddings and head.
    """
    if type == "f32" or weight.dim() == 1 or place.tensor.endswith(ROUTERS):
        return "f32"
    return embedding_type if place.tensor in _OUTER else "auto"
