"""Multi-head latent attention: the keys and values of all heads come from one short vector of each token, the latent.

llama.cpp has two ways to compute it. With `kv_b_proj` as two tensors it caches the latent. The one for keys is
transposed there, so its blocks would run across the groups of a grid: only floats can be written so. With `kv_b_proj`
as it is, on a grid or not, llama.cpp caches the keys and values of all heads, which takes many times as much memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

_LITE = (26, 27)
_UP = ".self_attn.kv_b_proj"
_KEYS, _VALUES = ".self_attn.k_b_proj", ".self_attn.v_b_proj"  # as `gguf` knows the two


def unsupported(config: Any) -> str | None:
    """Why llama.cpp cannot compute this attention as transformers does, or None."""
    if not config.rope_interleave:
        return "`rope_interleave` is False; llama.cpp turns neighbouring rows in deepseek2"
    layers = config.num_hidden_layers
    if (config.q_lora_rank is None) != (layers in _LITE):
        return (
            f"`q_lora_rank` is {config.q_lora_rank} with {layers} layers; llama.cpp tells by the number of layers "
            "whether queries come from a latent: they do not in models of 26 or 27, and do in all others"
        )
    rope = config.rope_parameters
    if rope.get("rope_type") == "yarn":
        both = rope.get("mscale"), rope.get("mscale_all_dim")
        if not both[0] or both[0] != both[1]:
            return f"`mscale` is {both[0]} and `mscale_all_dim` is {both[1]}; llama.cpp takes one number for both"
    return None


def notes(config: Any, grids: Collection[str]) -> list[str]:
    """What to know of the file."""
    found = []
    if not splits(grids):
        heads = config.num_attention_heads
        every = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        found.append(
            f"llama.cpp caches the keys and values of all {heads} heads, {every} numbers of each token and layer, "
            f"because `kv_b_proj` is on a grid. With exclude_modules=['kv_b_proj'] it caches the latent: {latent}."
        )
    if config.rms_norm_eps != 1e-6:
        found.append(
            f"llama.cpp normalizes latents with `rms_norm_eps` ({config.rms_norm_eps:g}), as all else; transformers "
            "takes 1e-06 for them."
        )
    return found


def splits(grids: Collection[str]) -> bool:
    """Whether `kv_b_proj` is written as two tensors: no such layer is on a grid.

    Args:
        grids: names of the modules that are.
    """
    return not any(name.endswith(_UP) for name in grids)


def pieces(name: str, weight: torch.Tensor, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """A float tensor of the state dict, `kv_b_proj` as the two that llama.cpp has: keys (heads, latent, nope), values
    (heads, v, latent)."""
    if not name.endswith(_UP + ".weight"):
        yield name, weight
        return
    keys, values = config.qk_nope_head_dim, config.v_head_dim
    heads = weight.view(config.num_attention_heads, keys + values, config.kv_lora_rank)
    yield name.replace(_UP, _KEYS), heads[:, :keys].transpose(1, 2).contiguous()
    yield name.replace(_UP, _VALUES), heads[:, keys:].contiguous()


def write_hyperparameters(writer: Any, config: Any, split: bool) -> None:
    """Put the numbers of attention into a `gguf.GGUFWriter`."""
    turned, latent = config.qk_rope_head_dim, config.kv_lora_rank
    keys, values = config.qk_nope_head_dim + turned, config.v_head_dim
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(latent)
    writer.add_rope_dimension_count(turned)
    writer.add_head_count_kv(1 if split else config.num_attention_heads)
    writer.add_key_length(latent + turned if split else keys)
    writer.add_value_length(latent if split else values)
    if split:
        writer.add_key_length_mla(keys)
        writer.add_value_length_mla(values)
    rope = config.rope_parameters
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
