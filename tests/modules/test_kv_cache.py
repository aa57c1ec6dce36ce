"""Attention layers that round what they write to the cache: every kind of decoder and cache, and who is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import EncoderDecoderCache, QuantizedCache

from peft_lrqat.modules.kv_cache import (
    attention_layers,
    find_rounding,
    keep_floats,
    round_cache,
    rounding_of,
    settle,
)
from peft_lrqat.ops.kv_cache import CacheRounding, round_states
from tests.models import logits, tiny, tokens

IDS = tokens(2, 9)
_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# What shares its keys and values with other layers, slides, has sinks, or is attention only here and there.
_OTHERS = {
    "Gemma3nText": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "sliding_window": 4,
    },
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4},
    "Qwen3Next": {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


def made(name: str, **options) -> nn.Module:
    """A random causal LM of an architecture."""
    config = getattr(transformers, name + "Config")(**{**_SMALL, **_OTHERS.get(name, {}), **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def rounding(model: nn.Module, bits: int = 4, rule: str = "vllm") -> nn.Module:
    round_cache(model, find_rounding(model, bits, rule))
    return model


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return rounding(tiny())


@pytest.mark.parametrize(
    ("name", "layers"), [("Gemma3nText", 2), ("GptOss", 4), ("Qwen3Next", 1), ("gpt2", 2), ("gemma3", 2), ("llama", 2)]
)
def test_generation_with_a_cache_is_the_forward_without(name: str, layers: int):
    model = made(name) if name in _OTHERS else tiny(name)
    floats = logits(model, IDS)
    rounding(model)
    assert len(attention_layers(model)) == layers
    assert not torch.equal(logits(model, IDS), floats)
    full = IDS
    with torch.no_grad():
        for _ in range(4):
            full = torch.cat([full, model(full, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None), full)
    keep_floats(model)
    assert torch.equal(logits(model, IDS), floats)


def test_the_cache_holds_what_was_rounded_once(llama: nn.Module):
    """The float model's keys and values of the first layer, rounded; a further token leaves them as they are."""
    plain, first, kept = tiny(), DynamicCache(), DynamicCache()
    with torch.no_grad():
        plain(IDS, past_key_values=first)
        llama(IDS, past_key_values=kept)
        layer, done = kept.layers[0], rounding_of(llama)
        assert torch.equal(layer.keys, round_states(first.layers[0].keys, done))
        assert torch.equal(layer.values, round_states(first.layers[0].values, done))
        before = [(one.keys.clone(), one.values.clone()) for one in kept.layers]
        llama(IDS[:, :1], past_key_values=kept)
    for one, (keys, values) in zip(kept.layers, before, strict=True):
        assert torch.equal(one.keys[:, :, :-1], keys)
        assert torch.equal(one.values[:, :, :-1], values)


def test_every_way_to_generate(llama: nn.Module):
    def generated(ids: torch.Tensor = IDS, **options) -> torch.Tensor:
        return llama.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)

    expected = generated()
    assert torch.equal(generated(use_cache=False), expected)
    assert torch.equal(generated(cache_implementation="static"), expected)
    assert torch.equal(generated(num_beams=3), generated(num_beams=3, use_cache=False))
    assert torch.equal(generated(IDS[:1], prompt_lookup_num_tokens=3), generated(IDS[:1]))


def test_continuous_batching(llama: nn.Module):
    """Its attention writes to pages of its own; keys and values reach it rounded."""
    model, plain = copy.deepcopy(llama), tiny()
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    found = model.generate_batch(IDS.tolist(), config, continuous_batching_config=pages, progress_bar=False)
    tokens = [one.generated_tokens for one in found.values()]
    expected, floats = (m.generate(IDS, generation_config=config)[:, IDS.shape[1] :].tolist() for m in (llama, plain))
    assert tokens == expected != floats


def test_the_implementation_of_attention_does_not_matter(llama: nn.Module):
    model = copy.deepcopy(llama)
    expected = logits(model, IDS)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, IDS), expected)


@pytest.mark.parametrize("rule", ["vllm", "transformers"])
def test_compiled_it_is_one_graph_and_the_same(rule: str):
    model = rounding(tiny(num_hidden_layers=1), rule=rule)
    layer, hidden = model.model.layers[0].self_attn, torch.randn(1, 5, 32)
    given = {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(5)[None]), "attention_mask": None}
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(hidden, **given)[0], layer(hidden, **given)[0])


def test_gradients_are_the_same_with_checkpoints(llama: nn.Module):
    found = []
    for checkpoints in (False, True):
        model = copy.deepcopy(llama).train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
        assert gradient.abs().sum() > 0, name


def test_copies_round_and_stop_alone(llama: nn.Module):
    expected = logits(llama, IDS)
    for other in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert torch.equal(logits(other, IDS), expected)
        layer = other.model.layers[0].self_attn
        keep_floats(other)
        assert rounding_of(other) is None
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks
    assert torch.equal(logits(llama, IDS), expected)


def test_what_belongs_to_the_model_stays():
    model = rounding(tiny())
    settle(model)
    round_cache(model, CacheRounding(8, "vllm"))  # it rounds already
    keep_floats(model)
    assert rounding_of(model) == CacheRounding(4, "vllm")
    assert len(model.model.layers[0].self_attn._forward_pre_hooks) == 1


def test_a_cache_that_is_given_by_position(llama: nn.Module):
    layer, shape = llama.model.layers[0].self_attn, (1, 3, 32)
    hidden, positions = torch.randn(shape), torch.arange(3).unsqueeze(0)
    angles = llama.model.rotary_emb(hidden, positions)
    with torch.no_grad():
        expected = layer(hidden, position_embeddings=angles, attention_mask=None)[0]
        cache = StaticCache(llama.config, max_cache_len=3)
        assert torch.equal(layer(hidden, angles, None, cache)[0], expected)
    assert cache.get_seq_length() == 3


def test_caches_that_are_refused(llama: nn.Module):
    layer = llama.model.layers[0].self_attn
    with pytest.raises(ValueError, match="would round it a second time"):
        layer(torch.randn(1, 3, 32), past_key_values=QuantizedCache.__new__(QuantizedCache))
    crossed = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with pytest.raises(ValueError, match="cross-attention cannot be trained"):
        llama(IDS, past_key_values=crossed)


def test_a_layer_that_keeps_its_keys_to_itself_is_found_out(llama: nn.Module, monkeypatch: pytest.MonkeyPatch):
    layer = copy.deepcopy(llama.model.layers[0].self_attn)
    monkeypatch.setattr(type(layer), "forward", lambda self, hidden, past_key_values=None: (hidden, None))
    with pytest.raises(RuntimeError, match="LlamaAttention did not write its keys and values"):
        layer(torch.randn(1, 3, 32))


def test_layers_that_differ_in_the_size_of_heads():
    """compressed-tensors asks such a configuration for one `head_dim`, and fails while loading."""
    shapes = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 12, "sliding_window": 4}
    model = made("Gemma4Text", **shapes, **kinds)
    with pytest.raises(ValueError, match=r"differ in `head_dim` \(8, 12\).*Use `kv_rule='vllm'`"):
        find_rounding(model, 8, "transformers")
    assert find_rounding(model, 8, "vllm").group_size is None


def test_keys_and_values_of_other_sizes_share_the_largest_group():
    model = made("MiMoV2Flash", v_head_dim=12, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    with pytest.raises(ValueError, match="has a `k_scale` or `v_scale` of its own"):
        find_rounding(model, 8, "transformers")
    for layer in attention_layers(model).values():
        del layer.v_scale
    assert find_rounding(model, 8, "transformers").group_size == 4


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: made("Mamba", state_size=4), "no attention layer of MambaForCausalLM writes"),
        (lambda: transformers.BertModel(transformers.BertConfig(**_SMALL)), "attends to another sequence"),
        (lambda: tiny("gpt2", add_cross_attention=True), "has cross-attention to an encoder"),
        (
            lambda: made("DeepseekV3", kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
                         v_head_dim=8, n_routed_experts=2, n_group=1, topk_group=1, moe_intermediate_size=16,
                         num_experts_per_tok=1),
            "multi-head latent attention",
        ),
        (
            lambda: made("DeepseekV4", q_lora_rank=8, o_lora_rank=8, o_groups=2, n_routed_experts=2,
                         num_experts_per_tok=1, moe_intermediate_size=16, layer_types=["sliding_attention"] * 4,
                         mlp_layer_types=["moe"] * 4, qk_rope_head_dim=4),
            "compresses its cache",
        ),
        (lambda: tiny("gpt2"), "transformers would not round the cache of 'transformer.h.0.attn'"),
        (lambda: tiny("opt"), "no `num_key_value_heads`, and compressed-tensors"),
    ],
    ids=["no attention", "an encoder", "cross-attention", "latent attention", "a compressed cache",
         "unknown to compressed-tensors", "that it fails to load"],
)  # fmt: skip
def test_models_that_are_refused(model, message: str):
    with pytest.raises(ValueError, match=message):
        find_rounding(model(), 8, "transformers")


def test_heads_of_odd_size_take_8_bits():
    model = tiny("gpt2", n_embd=28)
    with pytest.raises(ValueError, match="vLLM packs two to a byte"):
        find_rounding(model, 4, "vllm")
    assert find_rounding(model, 8, "vllm") == CacheRounding(8, "vllm")
