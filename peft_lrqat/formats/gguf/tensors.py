"""A model's tensors as the file has them: under llama.cpp's names, with rows in its order, in one of ggml's types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...grid import GridTensor
from . import architectures, choice, floats

_OUTER = ("embed_tokens", "lm_head")  # what `embedding_type` is about


def file_names(config: Any) -> Callable[[str], str]:
    """A function from names in the state dict to names in the file; raises ValueError for tensors without a place."""
    import gguf

    arch = architectures.ARCHITECTURES[config.model_type].name
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def rename(name: str) -> str:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"llama.cpp's architecture {arch!r} has no place for the tensor {name!r}.")
        return found

    return rename


def in_file_order(tensor: GridTensor, config: Any, name: str) -> GridTensor:
    """A module's weight with its rows in the file's order, on the CPU."""
    zero_point = None if tensor.zero_point is None else tensor.zero_point.cpu()
    tensor = GridTensor(tensor.codes.cpu(), tensor.scale.cpu(), zero_point, tensor.grid)
    order = architectures.row_order(config, name)
    return tensor if order is None else choice.rows_of(tensor, order)


def store_float(name: str, weight: torch.Tensor, config: Any, type: str, embedding_type: str) -> floats.StoredFloats:
    """A tensor that is on no grid. Norms and biases are float32 in every file, as llama.cpp wants them.

    Args:
        name: in the state dict.
        type: what is asked for quantized layers; "f32" makes everything float32.
        embedding_type: what is asked for embeddings and head.
    """
    module = name.rpartition(".")[0]
    order = architectures.row_order(config, module)
    if order is not None:
        weight = weight.cpu()[order]
    if weight.dim() > 1:
        kind = embedding_type if module.endswith(_OUTER) else "auto"
        return floats.store(weight, "f32" if type == "f32" else kind)
    weight = weight.float()
    if module.endswith("norm"):
        weight = weight + architectures.ARCHITECTURES[config.model_type].norm_offset
    return floats.store(weight, "f32")
