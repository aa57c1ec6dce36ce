"""The weight of an adapted layer, read instead of called: it is the merged one, and trains as a call does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_lrqat import LowBitSRConfig, LRQATConfig
from tests.models import tokens

LR, SR = (
    {"r": 4, "bits": 4, "group_size": 8, "init_lora_weights": False},
    {"bits": 4, "group_size": 8, "range_method": "minmax", "init_weights": False},
)
KINDS: dict[str, tuple[type, dict]] = {
    "lrqat": (LRQATConfig, LR),
    "lrqat per channel": (LRQATConfig, {**LR, "group_size": -1}),
    "lrqat asymmetric": (LRQATConfig, {**LR, "symmetric": False}),
    "lrqat, scales by channel": (LRQATConfig, {**LR, "learn_scales": "channel"}),
    "lrqat without scales": (LRQATConfig, {**LR, "learn_scales": False}),
    "low bit": (LowBitSRConfig, SR),
    "low bit with scales": (LowBitSRConfig, {**SR, "learn_scales": True}),
    "low bit projected": (LowBitSRConfig, {**SR, "forward_bits": 1.58, "learn_scales": True}),
}


class Net(nn.Module):
    """One linear layer, called or read."""

    def __init__(self, kind: type[nn.Module] = nn.Linear, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer: Any = Conv1D(24, 16) if kind is Conv1D else nn.Linear(16, 24)
            self.layer = layer.to(dtype)
            self.read = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.read:
            return self.layer(x)
        weight = self.layer.weight
        return F.linear(x, weight.t() if weight.shape[0] == 16 else weight, self.layer.bias)


def make(kind: str, base: nn.Module | None = None, **options: Any) -> Any:
    cls, settings = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(base or Net(), cls(**{**settings, "target_modules": ["layer"], **options}))


def gradients(model: nn.Module, x: torch.Tensor, run: Callable[..., torch.Tensor] | None = None) -> dict:
    model.zero_grad()
    (model if run is None else run)(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2)).to(dtype)


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys() != set()
    for name, grad in expected.items():
        assert grad.any(), name
        torch.testing.assert_close(found[name], grad, rtol=tolerance, atol=tolerance * float(grad.abs().max()))


@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_read_trains_as_one_that_is_called(kind: str, layer: type[nn.Module]):
    model, x = make(kind, Net(layer)), inputs()
    called = gradients(model, x)
    model.base_model.model.read = True
    assert_same(gradients(model, x), called, 1e-4)
    assert_same(gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False)), called, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_weight_that_merging_stores(kind: str, dtype: torch.dtype):
    model = make(kind, Net(dtype=dtype))
    layer: Any = model.base_model.model.layer
    read = layer.weight
    assert read.requires_grad
    assert read.dtype == dtype
    with model.disable_adapter():
        base = layer.weight
        assert not torch.equal(base, read)
    model.merge_adapter()
    assert torch.equal(layer.weight, read)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, read)
    assert torch.equal(model.merge_and_unload().layer.weight, read)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["lrqat", "low bit"])
def test_nothing_is_written_to_it(kind: str, training: bool):
    layer: Any = make(kind).base_model.model.layer
    writes = (
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.zero_(),
        lambda weight: weight.data.copy_(torch.zeros(24, 16)),
        lambda weight: weight.__setitem__(0, 0.0),
        lambda weight: setattr(weight, "data", torch.zeros(24, 16)),
        nn.init.xavier_uniform_,
    )
    for write in writes:
        with (
            torch.set_grad_enabled(training),
            pytest.raises(RuntimeError, match=r"would be lost\. The layer is adapted"),
        ):
            write(layer.weight)
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = nn.Parameter(torch.zeros(24, 16))


def test_several_adapters_are_read_together():
    model, x = make("lrqat"), inputs()
    model.add_adapter("second", LRQATConfig(**{**LR, "target_modules": ["layer"], "lora_alpha": 8}))
    model.base_model.set_adapter(["default", "second"])
    called = gradients(model, x)
    model.base_model.model.read = True
    assert_same(gradients(model, x), called, 1e-4)
    assert len(called) == 6


@pytest.mark.parametrize("kind", ["lrqat", "low bit"])
def test_a_compiled_model_reads_too(kind: str):
    model, x = make(kind), inputs()
    model.base_model.model.read = True
    expected = gradients(model, x)
    torch._dynamo.reset()
    assert_same(gradients(model, x, torch.compile(model, backend="aot_eager")), expected, 1e-5)


@pytest.mark.parametrize("kind", ["lrqat per channel", "low bit"])
def test_rounded_inputs_are_refused_where_the_weight_is_read(kind: str):
    model, x = make(kind, act_bits=8, group_size=-1, **({"bits": 8} if kind == "low bit" else {})), inputs()
    model.base_model.model.read = True
    with pytest.raises(ValueError, match=r"`act_bits` is 8, but the model reads.*`exclude_modules`"):
        model(x).sum().backward()


# -- models that read

_TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_VISION = {**_TEXT, "image_size": 16, "patch_size": 8}
_MAMBA = {"vocab_size": 96, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 1}
_WHISPER = {
    "vocab_size": 96,
    "d_model": 32,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 20,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_BART = {f"{side}_{what}": n for side in ("encoder", "decoder")
         for what, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
_IDS, _PIXELS = {"input_ids": tokens()}, {"pixel_values": torch.randn(2, 3, 16, 16)}
MODELS: dict[str, tuple[str, dict, dict]] = {
    "MambaForCausalLM": ("MambaConfig", {**_MAMBA, "time_step_rank": 4}, _IDS),
    "Mamba2ForCausalLM": (
        "Mamba2Config",
        {**_MAMBA, "head_dim": 8, "num_heads": 8, "n_groups": 2, "chunk_size": 4},
        _IDS,
    ),
    "JambaForCausalLM": (
        "JambaConfig",
        {**_TEXT, "num_hidden_layers": 2, "num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
         "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1,
         "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        _IDS,
    ),
    "FalconH1ForCausalLM": (
        "FalconH1Config",
        {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
         "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 4},
        _IDS,
    ),
    "SiglipVisionModel": ("SiglipVisionConfig", _VISION, _PIXELS),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", {**_VISION, "projection_dim": 16}, _PIXELS),
    "BartForConditionalGeneration": (
        "BartConfig",
        {**_BART, "vocab_size": 96, "d_model": 32, "max_position_embeddings": 32, "dropout": 0.0},
        {**_IDS, "decoder_input_ids": tokens()},
    ),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {**_WHISPER, **_BART},
        {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": tokens()},
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0},
        {**_IDS, "decoder_input_ids": tokens()},
    ),
}  # fmt: skip


def _outputs(model: nn.Module, batch: dict) -> torch.Tensor:
    found = model(**batch).to_tuple()
    return torch.cat([t.flatten() for t in found if isinstance(t, torch.Tensor) and t.is_floating_point()])


@pytest.mark.parametrize("architecture", MODELS)
def test_every_adapter_of_a_model_is_trained_and_merges_into_what_was_trained(method: ModuleType, architecture: str):
    config, settings, batch = MODELS[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, architecture)(getattr(transformers, config)(**settings))
        model = get_peft_model(model, method.config(group_size=-1, **method.MOVED))
    _outputs(model.train(), batch).square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    with torch.no_grad():
        expected = _outputs(model.eval(), batch)
        assert torch.equal(_outputs(model.merge_and_unload(), batch), expected)


class Attention(nn.Module):
    """torch's own attention, which reads `out_proj.weight`, and has a fast path without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def test_torchs_attention(method: ModuleType):
    base, x = Attention(), torch.randn(2, 5, 32)
    floats = copy.deepcopy(base.attention.in_proj_weight)
    model = get_peft_model(base, method.config(target_modules=["out_proj", "head"], **method.MOVED))
    model(x).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None)] == []
    with torch.no_grad():
        expected = model.eval()(x)
        merged = model.merge_and_unload()
        assert torch.equal(merged(x), expected)
    assert torch.equal(merged.attention.in_proj_weight, floats)


class Encoder(nn.Module):
    """torch's own block, which reads the weights of its layers in evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


@pytest.mark.parametrize("layers", [["out_proj"], ["linear1", "linear2"]])
def test_torchs_modules_that_read_are_no_place_for_rounded_inputs(method: ModuleType, layers: list[str]):
    x = torch.randn(2, 5, 32)
    options = {"target_modules": layers, "group_size": -1, **method.MOVED}
    for config in (method.config(**options), method.config(**options, act_bits=8, act_bits_pattern={"block.*": None})):
        model = get_peft_model(Encoder(), config)
        trained = model.train()(x)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), trained)
    with pytest.raises(
        ValueError, match=rf"`act_bits` rounds the input of module 'block\..*{layers[0]}', but .* reads"
    ):
        get_peft_model(Encoder(), method.config(**options, act_bits=8))
