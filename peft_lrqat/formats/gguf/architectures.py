"""What llama.cpp must know of a model beside its weights: one row of a table for each architecture.

Every value is read from the model's configuration. What llama.cpp would compute otherwise than transformers is refused,
or, where it only matters for long texts, noted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from . import latent, mixtures
from .mixtures import Mixture


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp runs a model of transformers.

    Attributes:
        name: llama.cpp's name of the architecture.
        activation: the only activation function it computes.
        interleaved: whether the rotary embedding turns neighbouring rows of q and k, where transformers turns rows half
            a head apart; the rows of both are stored in the other order then.
        norm_offset: what transformers adds to the weights of normalizations, and llama.cpp expects to find in them.
        window_every: n if every n-th layer attends to everything and the others to `sliding_window` tokens; 0: none do.
        scaled_by_size: the number of layers of the size for which llama.cpp scales attention by hidden_size / heads
            rather than by head_dim; None where it does not depend on the size.
        latent: whether its keys and values come from a latent, see `latent.py`.
        mixture: how it runs experts; None: it has none.
    """

    name: str
    activation: str = "silu"
    interleaved: bool = False
    norm_offset: float = 0.0
    window_every: int = 0
    scaled_by_size: int | None = None
    latent: bool = False
    mixture: Mixture | None = None


_GELU = "gelu_pytorch_tanh"
_LLAMA = Architecture("llama", interleaved=True)

#: `model_type` of the configuration -> what llama.cpp makes of it.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", _GELU, norm_offset=1.0),
    "gemma2": Architecture("gemma2", _GELU, norm_offset=1.0, window_every=2, scaled_by_size=46),
    "gemma3_text": Architecture("gemma3", _GELU, norm_offset=1.0, window_every=6, scaled_by_size=62),
    "mixtral": Architecture("llama", interleaved=True, mixture=Mixture("num_local_experts", "", normalized=True)),
    "qwen2_moe": Architecture("qwen2moe", mixture=Mixture(normalized=False, head=True, square=True)),
    "qwen3_moe": Architecture("qwen3moe", mixture=Mixture(normalized=True)),
    "olmoe": Architecture("olmoe", mixture=Mixture(width="", normalized=False, head=True, square=True, grouped=False)),
    "deepseek_v3": Architecture("deepseek2", latent=True, mixture=Mixture("n_routed_experts")),
}

# GGUFWriter's method -> attributes of the configuration, of which the first that exists counts
_PLAIN = {
    "add_block_count": ("num_hidden_layers",),
    "add_context_length": ("max_position_embeddings",),
    "add_embedding_length": ("hidden_size",),
    "add_feed_forward_length": ("intermediate_size",),
    "add_head_count": ("num_attention_heads",),
    "add_layer_norm_rms_eps": ("rms_norm_eps",),
    "add_vocab_size": ("vocab_size",),
    "add_attn_logit_softcapping": ("attn_logit_softcapping",),
    "add_final_logit_softcapping": ("final_logit_softcapping",),
}


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def experts(config: Any) -> int:
    """How many experts a layer has; 0: it is no mixture."""
    mixture = ARCHITECTURES[config.model_type].mixture
    return 0 if mixture is None else getattr(config, mixture.count)


def unsupported(config: Any) -> str | None:
    """Why llama.cpp cannot run this model as transformers does, or None."""
    arch = ARCHITECTURES.get(config.model_type)
    if arch is None:
        return (
            f"the architecture {config.model_type!r} has no GGUF export here; supported are "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation != arch.activation:
        return f"the activation function is {activation!r}; llama.cpp computes {arch.activation!r} in {arch.name}"
    if getattr(config, "use_bidirectional_attention", None):
        return "`use_bidirectional_attention` is set; llama.cpp's attention is causal"
    scale = getattr(config, "query_pre_attn_scalar", None)
    by_size = config.num_hidden_layers == arch.scaled_by_size
    assumed = config.hidden_size // config.num_attention_heads if by_size else head_dim(config)
    if arch.scaled_by_size and scale != assumed:
        return f"`query_pre_attn_scalar` is {scale}; llama.cpp takes {assumed} in {arch.name}"
    layers = getattr(config, "layer_types", None) or []
    if layers != _layer_types(arch, config) and "sliding_attention" in layers:
        return f"`layer_types` is {layers}; llama.cpp's {arch.name} takes {_layer_types(arch, config)}"
    for rope in _ropes(config).values():
        if rope.get("rope_type", "default") not in ("default", "linear", "yarn", "llama3"):
            return f"rotary embeddings are scaled by {rope['rope_type']!r}; linear, yarn and llama3 can be written"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            return "`partial_rotary_factor` is not 1, which llama.cpp has no place for in this architecture"
    if arch.latent and (reason := latent.unsupported(config)):
        return reason
    return None if arch.mixture is None else mixtures.unsupported(config, arch.mixture, arch.name)


def notes(config: Any, grids: Collection[str]) -> list[str]:
    """Where llama.cpp differs from transformers in what few models meet.

    Args:
        grids: names of the modules that are on a grid.
    """
    window = getattr(config, "sliding_window", None)
    if ARCHITECTURES[config.model_type].latent:
        return latent.notes(config, grids)
    if not ARCHITECTURES[config.model_type].window_every and window and window < config.max_position_embeddings:
        return [
            f"llama.cpp does not apply the sliding window of {window} tokens in this architecture: beyond that many "
            "tokens its attention sees more than the model's own."
        ]
    return []


def _layer_types(arch: Architecture, config: Any) -> list[str]:
    every = arch.window_every
    return [
        "full_attention" if not every or (i + 1) % every == 0 else "sliding_attention"
        for i in range(config.num_hidden_layers)
    ]


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """Layer type -> parameters of its rotary embedding; one "full_attention" where there is one kind."""
    ropes = config.rope_parameters
    return ropes if "full_attention" in ropes else {"full_attention": ropes}


def write_hyperparameters(writer: Any, config: Any, grids: Collection[str]) -> None:
    """Put the architecture's numbers into a `gguf.GGUFWriter`.

    Args:
        grids: names of the modules that are on a grid.
    """
    import gguf

    arch = ARCHITECTURES[config.model_type]
    for method, names in _PLAIN.items():
        value = next((v for name in names if (v := getattr(config, name, None)) is not None), None)
        if value is not None:
            getattr(writer, method)(value)
    if arch.latent:
        latent.write_hyperparameters(writer, config, latent.splits(grids))
    else:
        writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        for method in ("add_key_length", "add_value_length", "add_rope_dimension_count"):
            getattr(writer, method)(head_dim(config))
    if arch.window_every:
        writer.add_sliding_window(config.sliding_window)
    if arch.mixture is not None:
        mixtures.write_hyperparameters(writer, config, arch.mixture)
    ropes = _ropes(config)
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    rope = ropes["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        for key, method in (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
        ):
            if rope.get(key) is not None:
                method(rope[key])


def rope_divisors(config: Any) -> torch.Tensor | None:
    """fp32 (head_dim / 2,), by which llama.cpp divides the rotary frequencies of Llama 3.1 and later; else None."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = _ropes(config)["full_attention"]
    if rope.get("rope_type") != "llama3":
        return None
    width = head_dim(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return plain / scaled


def row_order(config: Any, name: str) -> torch.Tensor | None:
    """The order of the rows of a module's weight and bias in the file, int64 (out,), or None for as they are.

    Args:
        name: of the module, as in the model.
    """
    if not ARCHITECTURES[config.model_type].interleaved:
        return None
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])
    if heads is None:
        return None
    width = head_dim(config)
    return torch.arange(heads * width).view(heads, 2, width // 2).transpose(1, 2).reshape(-1)
