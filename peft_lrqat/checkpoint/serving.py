"""What a user must know who serves a model with rounded activations or a rounded KV cache: the command, the warnings.

Engines load some of these checkpoints and quietly keep in floats what was trained on a grid, so it is said wherever a
user comes by: when the adapter is made and merged, in the report of an export, by `inspect` and `verify`, on the card.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..formats import compressed_tensors
from ..formats.compressed_tensors import Stored, multiplies_int8
from ..ops.kv_cache import CacheRounding
from .folder import FolderSource

_PACKED = (
    "Rounded activations beside packed weights: vLLM (0.32, read in its source) rounds them on GPUs only, with the "
    "package humming-kernels and --linear-backend humming. Its other kernels, and its build for CPUs, load the "
    "checkpoint and leave activations float without a word."
)
_VLLM_STEPS = (
    "vLLM gives the largest activation of a token 127 steps (7 of 4 bits), not the 127.5 (7.5) of transformers, by "
    "which this was trained; act_rule='vllm' trains vLLM's arithmetic."
)
_TRANSFORMERS_STEPS = (
    "transformers alone rounds activations otherwise than vLLM, by whose rule this was trained; "
    "peft_lrqat.load_quantized rounds them as trained."
)
_CACHE_KEPT = "transformers rounds the KV cache as it was trained"
_CACHE_REFUSED = "vLLM refuses the checkpoint, because it knows no KV cache of integers in config.json."


class Serving(NamedTuple):
    """How to serve a checkpoint.

    Attributes:
        options: vLLM's, with which it computes as was trained, as nearly as it can; None: it does not.
        notes: sentences on activations and on the KV cache; none where both are floats.
    """

    options: str | None = ""
    notes: tuple[str, ...] = ()


def serving(format: str | None, layers: Iterable[Stored], cache: CacheRounding | None, problem: str = "") -> Serving:
    """What to know about serving a checkpoint.

    Args:
        format: of the checkpoint; None is compressed-tensors.
        layers: how its linear layers are stored.
        cache: how the model rounds its KV cache, or None.
        problem: what keeps transformers from computing as was trained, or nothing.
    """
    options, notes = [], []
    if format in (None, compressed_tensors.NAME):
        rounded = [stored for stored in layers if stored[2] is not None]
        if problem and (rounded or (cache is not None and cache.rule == "transformers")):
            notes.append(f"Plain transformers: {problem}. peft_lrqat.load_quantized computes as was trained.")
        rules = {activations.rule for _, _, activations in rounded if activations and not activations.static}
        if not all(multiplies_int8(*stored) for stored in rounded):
            options.append("--linear-backend humming")
            notes.append(_PACKED)
        if rules:
            notes.append(_VLLM_STEPS if rules == {compressed_tensors.NAME} else _TRANSFORMERS_STEPS)
        if cache is not None and cache.rule == "transformers":
            return Serving(None, (*notes, _CACHE_REFUSED if problem else f"{_CACHE_KEPT}; {_CACHE_REFUSED}"))
    if cache is not None and cache.rule == "vllm":
        options.append(f"--kv-cache-dtype int{cache.bits}_per_token_head")
        notes.append(
            f"Start vLLM with {options[-1]}, which rounds the KV cache as it was trained; transformers alone keeps it "
            "in floats, and peft_lrqat.load_quantized rounds it."
        )
    return Serving(" ".join(options), tuple(notes))


def stored_serving(checkpoint: FolderSource) -> Serving:
    """What to know about serving a checkpoint in a folder."""
    infos = [info for info in checkpoint.grids().values() if info.kind == "linear"]
    layers = [(info.grid, info.container_bits, info.activations) for info in infos]
    return serving(checkpoint.format, layers, checkpoint.cache, checkpoint.problem())
