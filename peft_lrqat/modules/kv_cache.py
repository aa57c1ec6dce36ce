"""Keys and values that are rounded where an attention layer writes them to its cache, and in training, where there is
none.

Every attention layer of transformers hands its keys, after the rotary embedding, and its values to
`past_key_values.update(...)` and goes on with what that returns. So a hook gives the layer a stand-in for the cache,
which rounds first (`ops/kv_cache.py`) and then writes to the cache that was given. Where there is none, it returns what
it has rounded. That is all: the kind of cache (sliding windows, static, offloaded), beams, padding, packed sequences,
the implementation of attention and gradient checkpointing do not matter, and layers that read what another has written
(Gemma 3n) read it rounded. compressed-tensors does the same to the models that transformers loads.

What is stored was rounded once, and nothing is rounded again when it is read.
"""

from __future__ import annotations

import inspect
import math
import re
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache, QuantizedCache

from ..ops.kv_cache import CacheRounding, round_states

# What attention layers call their cache, and how they write to it.
_NAMES = ("past_key_values", "past_key_value", "layer_past")
_WRITES = re.compile(r"\b\w*past\w*\.update\(")

# By what compressed-tensors (0.18 to 0.20) knows the layers whose cache it rounds; see `_known_to_transformers`.
_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")

# What attention with one vector for all heads has: DeepSeek V2 and V3 and those built after them; DeepSeek V4.
_LATENT = ("kv_lora_rank", "kv_b_proj", "compressor")

# What compressed-tensors calls its own numbers in attention layers.
_SCALES = ("k_scale", "v_scale")

_WITHOUT = "Leave `kv_bits` out."


class _Writing(NamedTuple):
    """How an attention layer gets its cache, and what is done to it."""

    rounding: CacheRounding
    name: str  # of the parameter of its forward
    place: int  # of that parameter, without `self`
    of_base: bool  # whether the model was so before it was adapted


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> module of the attention layers of a model that write keys and values to a cache."""
    return {
        name: module
        for name, module in model.named_modules()
        if _parameter(module) is not None and not getattr(module, "is_kv_shared_layer", False)
    }


def find_rounding(model: nn.Module, bits: int, rule: str) -> CacheRounding:
    """The rounding of a model's cache to so many bits by a rule, once it is known that the model can have it.

    Raises:
        ValueError: the model has no such cache, its engines keep another one than transformers does, or transformers
            would not round what is trained so.
    """
    layers, config = attention_layers(model), getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"`kv_bits` is {bits}, but {type(model).__name__} has cross-attention to an encoder, whose cache is "
            f"written once and otherwise; decoders can be trained so. {_WITHOUT}"
        )
    if not layers:
        raise ValueError(
            f"`kv_bits` is {bits}, but no attention layer of {type(model).__name__} writes keys and values by "
            f"`past_key_values.update(...)`, as those of transformers' decoders do. {_WITHOUT}"
        )
    for name, layer in layers.items():
        _check_layer(name, layer, bits, rule)
    sizes = {size for layer in layers.values() for size in _head_sizes(layer, config)}
    if rule == "transformers" and not _has_one_head_dim(config):
        raise ValueError(
            f"`kv_bits` is {bits} with `kv_rule='transformers'`, but the layers of {type(model).__name__} differ in "
            f"`head_dim` ({', '.join(map(str, sorted(sizes)))}), and compressed-tensors, which asks for one, fails to "
            "load such a checkpoint (seen with 0.20). Use `kv_rule='vllm'`, or leave `kv_bits` out."
        )
    if rule == "transformers" and config is not None and not hasattr(_text_config(config), "num_key_value_heads"):
        raise ValueError(
            f"`kv_bits` is {bits} with `kv_rule='transformers'`, but the configuration of {type(model).__name__} has "
            "no `num_key_value_heads`, and compressed-tensors, which asks for it, fails to load the checkpoint (seen "
            "with 0.20). Use `kv_rule='vllm'`, or leave `kv_bits` out."
        )
    if rule == "vllm" and bits == 4 and any(size % 2 for size in sizes):
        raise ValueError(f"`kv_bits` is 4 with heads of {sorted(sizes)} numbers; vLLM packs two to a byte. Use 8 bits.")
    return CacheRounding(bits, rule, math.gcd(*sizes) if rule == "transformers" else None)


def rounding_of(model: nn.Module) -> CacheRounding | None:
    """How a model's cache is rounded, or None."""
    return next((layer._kv_writing.rounding for layer in _rounding_layers(model)), None)


def _rounding_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "_kv_writing")]


def round_cache(model: nn.Module, rounding: CacheRounding, of_base: bool = False) -> None:
    """Round keys and values of a model from now on, as `rounding` says, unless they are rounded already.

    Args:
        of_base: whether that belongs to the model itself, not to an adapter, whose `unload` ends it.
    """
    for layer in attention_layers(model).values():
        if hasattr(layer, "_kv_writing"):
            continue
        name, place = _parameter(layer) or ("", 0)
        layer._kv_writing = _Writing(rounding, name, place, of_base)
        layer._kv_hooks = (
            layer.register_forward_pre_hook(_give_stand_in, with_kwargs=True),
            layer.register_forward_hook(_check_written, with_kwargs=True),
        )


def keep_floats(model: nn.Module) -> None:
    """End the rounding that an adapter has begun."""
    for layer in _rounding_layers(model):
        if not layer._kv_writing.of_base:
            for handle in layer._kv_hooks:
                handle.remove()
            del layer._kv_writing, layer._kv_hooks


def settle(model: nn.Module) -> None:
    """Make that rounding the model's own: the adapter has become part of it."""
    for layer in _rounding_layers(model):
        layer._kv_writing = layer._kv_writing._replace(of_base=True)


def rounding_for(model: nn.Module, config: Any) -> CacheRounding | None:
    """How a new adapter of a model rounds its cache; None: not at all.

    A model that was loaded with a rounded cache keeps it: an option that was left open becomes the model's.

    Args:
        config: of the adapter; `kv_bits` and `kv_rule` may be set.

    Raises:
        ValueError: the cache of the model cannot be rounded so, or is rounded otherwise.
    """
    layers = _rounding_layers(model)
    if not layers:
        return None if config.kv_bits is None else find_rounding(model, config.kv_bits, config.kv_rule)
    present, of_base = layers[0]._kv_writing.rounding, layers[0]._kv_writing.of_base
    if config.kv_bits is None and of_base and config._adapter_shapes is None:
        config.kv_bits, config.kv_rule = present.bits, present.rule
    if (config.kv_bits, config.kv_rule) != (present.bits, present.rule):
        wanted = "floats" if config.kv_bits is None else f"{config.kv_bits} bits by the rule of {config.kv_rule}"
        raise ValueError(
            f"The model's KV cache is rounded to {present.describe()}, but the adapter has {wanted} (`kv_bits`, "
            "`kv_rule`). One cache serves all adapters of a model, and the checkpoint that it came from. Give the same "
            "for all, or start from the float model."
        )
    return present


def adopt_cache(model: nn.Module, rounding: CacheRounding | None) -> None:
    """Take over the rounding that compressed-tensors does in a model which transformers loaded, because that stops the
    gradient of keys and values.

    Args:
        rounding: what the checkpoint's `kv_cache_scheme` means; None: it has none.
    """
    if rounding is None:
        return
    for module in model.modules():
        layer: Any = module
        if type(getattr(layer, "kv_cache", None)).__name__ != "QuantizedKVCache":
            continue
        hooks: Any = layer._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook.__name__ == "_kv_cache_attention_hook"]:
            del hooks[key], layer._forward_pre_hooks_with_kwargs[key]
        del layer.kv_cache, layer.quantization_scheme, layer.quantization_status
    round_cache(model, rounding, of_base=True)


# -- layers


def _parameter(layer: Any) -> tuple[str, int] | None:
    """Name and place of the parameter by which a layer gets the cache that it writes to; None: it does not."""
    return _parameter_of(type(layer).forward)


@lru_cache(maxsize=256)
def _parameter_of(forward: Any) -> tuple[str, int] | None:
    names = [name for name in inspect.signature(forward).parameters if name != "self"]
    name = next((name for name in _NAMES if name in names), None)
    if name is None:
        return None
    try:
        source = inspect.getsource(forward)
    except (OSError, TypeError):
        return None
    return (name, names.index(name)) if _WRITES.search(source) else None


def _check_layer(name: str, layer: Any, bits: int, rule: str) -> None:
    """Raise ValueError if the cache of an attention layer cannot be rounded so."""
    kind = type(layer).__name__
    if any(hasattr(layer, part) for part in _LATENT):
        raise ValueError(
            f"`kv_bits` is {bits}, but {name!r} ({kind}) is multi-head latent attention, or compresses its cache: "
            f"engines keep one vector of a token for all heads, in formats of their own. {_WITHOUT}"
        )
    if "CrossAttention" in kind or getattr(layer, "is_causal", True) is False:
        raise ValueError(
            f"`kv_bits` is {bits}, but {name!r} ({kind}) attends to another sequence, or in both directions, and keeps "
            f"no cache as a decoder does. {_WITHOUT}"
        )
    if rule == "transformers" and not _known_to_transformers(layer):
        raise ValueError(
            f"`kv_bits` is {bits} with `kv_rule='transformers'`, but transformers would not round the cache of "
            f"{name!r} ({kind}): compressed-tensors knows attention by its `past_key_values` and its k_proj, v_proj or "
            "qkv_proj. Use `kv_rule='vllm'`, or leave `kv_bits` out."
        )
    if rule == "transformers" and any(hasattr(layer, part) for part in _SCALES):
        raise ValueError(
            f"`kv_bits` is {bits} with `kv_rule='transformers'`, but {name!r} ({kind}) has a `k_scale` or `v_scale` of "
            "its own, which compressed-tensors (0.20) takes away from attention whose cache it rounds, so that the "
            "checkpoint could not be run. Use `kv_rule='vllm'`, or leave `kv_bits` out."
        )


def _known_to_transformers(layer: Any) -> bool:
    """Whether compressed-tensors rounds the cache of such a layer (its `is_cached_attention_module`)."""
    name, _ = _parameter(layer) or ("", 0)
    named = "attention" in type(layer).__name__.lower() and any(hasattr(layer, part) for part in _PROJECTIONS)
    return named and name in ("past_key_values", "past_key_value")


def _has_one_head_dim(config: Any) -> bool:
    """Whether one may ask a model's configuration for `head_dim`; of Gemma 4, whose layers differ, transformers refuses
    to say it."""
    try:
        hasattr(_text_config(config) if config is not None else None, "head_dim")
    except Exception:  # of a class that only newer versions of transformers have
        return False
    return True


def _text_config(config: Any) -> Any:
    """What a model's configuration says of its decoder, as compressed-tensors reads it."""
    return config.get_text_config(decoder=True)


def _head_sizes(layer: Any, config: Any) -> list[int]:
    """How many numbers a head of an attention layer has in keys and in values."""
    sizes = (getattr(layer, name, None) for name in ("head_dim", "v_head_dim", "head_size"))
    found = [size for size in sizes if isinstance(size, int) and size > 0]
    if not found and config is not None:
        text = config.get_text_config()
        found = [getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads]
    return found


# -- the stand-in


class RoundingCache:
    """What an attention layer takes for its cache."""

    def __init__(self, cache: Any, rounding: CacheRounding) -> None:
        """
        Args:
            cache: the one that the layer was given, or None.
        """
        self.cache, self.rounding, self.written = cache, rounding, False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values, (batch, heads, tokens, head size), and return all that are there."""
        self.written = True
        key_states, value_states = round_states(key_states, self.rounding), round_states(value_states, self.rounding)
        if self.cache is None:
            return key_states, value_states
        return self.cache.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """How many tokens are in the cache."""
        return 0 if self.cache is None else self.cache.get_seq_length(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "cache" or self.cache is None:
            raise AttributeError(f"The stand-in for a layer's cache (`kv_bits`) has no {name!r}.")
        return getattr(self.cache, name)


def _give_stand_in(layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A hook before an attention layer's forward."""
    rounding, name, place, _ = layer._kv_writing
    if place < len(args):
        return (*args[:place], _stand_in(args[place], rounding), *args[place + 1 :]), kwargs
    return args, {**kwargs, name: _stand_in(kwargs.get(name), rounding)}


def _stand_in(cache: Any, rounding: CacheRounding) -> RoundingCache:
    if isinstance(cache, QuantizedCache):
        raise ValueError(
            f"The model rounds its KV cache already ({rounding.describe()}), as it was trained; transformers' "
            "quantized cache would round it a second time. Leave `cache_implementation='quantized'` out."
        )
    if isinstance(cache, EncoderDecoderCache):
        raise ValueError(f"Models with cross-attention cannot be trained with a rounded KV cache. {_WITHOUT}")
    return RoundingCache(cache, rounding)


def _check_written(layer: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """A hook after an attention layer's forward."""
    _, name, place, _ = layer._kv_writing
    if not (args[place] if place < len(args) else kwargs[name]).written:
        raise RuntimeError(
            f"{type(layer).__name__} did not write its keys and values to the cache that it was given, so they were "
            f"not rounded (`kv_bits`): it computes otherwise than its kind in transformers. {_WITHOUT}"
        )


#: The hooks of this file: what they do is the same in every call of a layer, so recording it once is enough.
HOOKS = (_give_stand_in, _check_written)
