"""What llama.cpp must know of a mixture of experts: how many there are, how wide, and what chooses among them.

Most of it is fixed in llama.cpp's code for an architecture, and a configuration that says otherwise is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mixture:
    """How llama.cpp runs the experts of an architecture.

    Attributes:
        count: the configuration's name for the number of experts in a layer.
        width: its name for the width of an expert; "" where `intermediate_size` is that.
        normalized: whether the weights of the chosen experts are divided by their sum; None: as the file says.
        head: whether the file must have an output layer of its own, which a model with tied embeddings has not.
        square: whether attention must be as wide as the model.
        grouped: whether there may be fewer heads for keys than for queries.
    """

    count: str = "num_experts"
    width: str = "moe_intermediate_size"
    normalized: bool | None = None
    head: bool = False
    square: bool = False
    grouped: bool = True


def unsupported(config: Any, mixture: Mixture, name: str) -> str | None:
    """Why llama.cpp cannot run this mixture as transformers does, or None.

    Args:
        name: llama.cpp's name of the architecture.
    """
    normalized = getattr(config, "norm_topk_prob", mixture.normalized)
    if mixture.normalized is not None and normalized != mixture.normalized:
        return f"`norm_topk_prob` is {normalized}; llama.cpp takes {mixture.normalized} in {name}"
    dense = getattr(config, "mlp_only_layers", None)
    step = getattr(config, "decoder_sparse_step", 1)
    if dense or step != 1:
        what = f"`mlp_only_layers` is {dense}" if dense else f"`decoder_sparse_step` is {step}"
        return f"{what}; every layer has experts in llama.cpp's {name}"
    if mixture.head and config.tie_word_embeddings:
        return f"`tie_word_embeddings` is set; llama.cpp's {name} has an output layer of its own"
    if getattr(config, "attention_bias", False):
        return f"`attention_bias` is set; llama.cpp's {name} has no place for biases in attention"
    heads, width = config.num_attention_heads, getattr(config, "head_dim", None)
    if mixture.square and width is not None and heads * width != config.hidden_size:
        return (
            f"attention is {heads} heads x {width} wide; llama.cpp takes `hidden_size` ({config.hidden_size}) in {name}"
        )
    if not mixture.grouped and config.num_key_value_heads != heads:
        return f"`num_key_value_heads` is {config.num_key_value_heads}; llama.cpp takes {heads}, one a head, in {name}"
    if getattr(config, "clip_qkv", None) is not None:
        return f"`clip_qkv` is {config.clip_qkv}; llama.cpp's {name} clips nothing"
    return None


def write_hyperparameters(writer: Any, config: Any, mixture: Mixture) -> None:
    """Put the mixture's numbers into a `gguf.GGUFWriter`."""
    writer.add_expert_count(getattr(config, mixture.count))
    writer.add_expert_used_count(config.num_experts_per_tok)
    if mixture.width:
        writer.add_expert_feed_forward_length(getattr(config, mixture.width))
    shared = getattr(config, "shared_expert_intermediate_size", None)
    if shared is not None:
        writer.add_expert_shared_feed_forward_length(shared)
    if mixture.normalized is None:
        _write_routing(writer, config)


def _write_routing(writer: Any, config: Any) -> None:
    """What only the architectures that ask the file for it know: DeepSeek's."""
    import gguf

    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    if config.topk_group < config.n_group:  # else every group is looked at, which llama.cpp has no number for
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
