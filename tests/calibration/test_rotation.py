"""A float model is rotated in place, computes what it did, has no outliers, and stays an ordinary model."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from peft_lrqat import LRQATConfig, preprocess_gptq, preprocess_rotation
from peft_lrqat.calibration.residual_stream import Change
from peft_lrqat.calibration.rotation import KEY
from tests.models import adapted, logits, low_bit, tiny, tokens, train

IDS = tokens()


def rotate(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    preprocess_rotation(model, progressbar=False, **options)
    return model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], value) for name, value in state.items())


def gained(model: PreTrainedModel) -> PreTrainedModel:
    """With gains that are not 1."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


# -- what comes of it


@pytest.fixture(scope="module")
def rotated() -> PreTrainedModel:
    """In bf16, embeddings and head untied by it."""
    return rotate(gained(tiny(dtype=torch.bfloat16, tie=True)))


def test_weights_are_computed_in_fp64_and_cast_once(rotated: PreTrainedModel):
    exact = rotate(gained(tiny(dtype=torch.bfloat16, tie=True)).double())
    for name, value in rotated.state_dict().items():
        assert torch.equal(value, exact.state_dict()[name].bfloat16()), name
    assert torch.equal(rotated.model.norm.weight, torch.ones_like(rotated.model.norm.weight))
    assert all(layer.input_layernorm.weight.eq(1).all() for layer in rotated.model.layers)


def test_a_tied_head_gets_its_own_matrix(caplog: pytest.LogCaptureFixture):
    model = gained(tiny(tie=True))
    before = logits(model, IDS)
    with caplog.at_level(logging.INFO, logger="peft_lrqat"):
        rotate(model)
    assert "lm_head shared its matrix with the embeddings. They are two now, 12.3 kB more" in caplog.text
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    model.tie_weights()  # as transformers does when a model is loaded or resized
    assert torch.allclose(logits(model, IDS), before, rtol=1e-4, atol=1e-5)
    values = gained(tiny(tie=True))
    rotate(values, residual=False)
    assert values.lm_head.weight is values.model.embed_tokens.weight
    assert values.config.tie_word_embeddings is True


def test_it_is_an_ordinary_model_that_both_methods_train(rotated: PreTrainedModel, tmp_path: Path):
    folders, expected = [tmp_path / "float"], [logits(rotated, IDS)]
    rotated.save_pretrained(folders[0])
    for make in (adapted, low_bit):
        model = make(copy.deepcopy(rotated))
        train(model, IDS)
        folders.append(tmp_path / make.__name__)
        expected.append(logits(model, IDS))
        merged = model.merge_and_unload()
        assert torch.equal(logits(merged, IDS), expected[-1])
        merged.save_pretrained(folders[-1])
    for folder, wanted in zip(folders, expected, strict=True):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder), IDS), wanted)


@pytest.mark.parametrize("make", [adapted, low_bit])
def test_an_adapter_belongs_to_the_rotated_model(make: Any, tmp_path: Path):
    make(rotate(tiny())).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another base model.*`preprocess_rotation`"):
        PeftModel.from_pretrained(tiny(), tmp_path)
    PeftModel.from_pretrained(rotate(tiny()), tmp_path)


def test_the_seed_decides_and_the_configuration_says_it(rotated: PreTrainedModel):
    again = rotate(gained(tiny(dtype=torch.bfloat16, tie=True)), device="cpu")
    assert same(again, rotated.state_dict())
    assert getattr(again.config, KEY) == [{"residual": True, "values": True, "seed": 0}]
    other = rotate(gained(tiny(dtype=torch.bfloat16, tie=True)), seed=1, values=False)
    assert not torch.equal(other.model.embed_tokens.weight, rotated.model.embed_tokens.weight)
    assert getattr(rotate(other, residual=False).config, KEY) == [
        {"residual": True, "values": False, "seed": 1},
        {"residual": False, "values": True, "seed": 0},
    ]


def test_parameters_hooks_and_modes_stay():
    model, seen = tiny(), []
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    parameters = dict(model.named_parameters())
    model.lm_head.requires_grad_(False)
    rotate(model)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert [one.training for one in (model, model.model.layers[1], model.model.layers[0].mlp)] == [True, True, False]
    assert [one.weight.requires_grad for one in (model.lm_head, model.model.norm)] == [False, True]
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == [model.model.layers[1]]
    assert len(seen) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = rotate(tiny())
    assert same(under, rotate(tiny()).state_dict())


def test_flex_attention_comes_back():
    model = tiny()
    model.set_attn_implementation("flex_attention")
    assert same(rotate(model), rotate(tiny()).state_dict())
    assert model.config._attn_implementation == "flex_attention"


def test_a_model_with_a_score_is_rotated():
    model = AutoModelForSequenceClassification.from_config(tiny().config).eval()
    before = logits(model, IDS)
    rotate(model)
    assert torch.allclose(logits(model, IDS), before, rtol=1e-4, atol=1e-6)
    assert model.model.norm.weight.eq(1).all()


# -- outliers


def outlying() -> PreTrainedModel:
    """A model with channels of the stream, and of every head's values, that are far out, as large models have them."""
    model = tiny(hidden_size=64, intermediate_size=96, head_dim=16)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[[3, 40]] *= 40
        for linear in readers:
            linear.weight.data[:, [3, 40]] /= 40
        attention.v_proj.weight.data[5::16] *= 40
        attention.o_proj.weight.data[:, 5::16] /= 40
    return model


def losses(model: PreTrainedModel) -> dict[str, float]:
    """What rounding a layer's inputs to 4 bits a token costs its outputs, by the layer's name."""
    found: dict[str, float] = {}

    def measure(name: str, layer: nn.Linear, x: torch.Tensor) -> None:
        step = x.abs().amax(-1, keepdim=True) / 7
        y, rounded = (nn.functional.linear(one, layer.weight) for one in (x, (x / step).round() * step))
        found[name] = ((rounded - y).norm() / y.norm()).item()

    for name, layer in model.model.layers.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda layer, args, _, name=name: measure(name, layer, args[0]))
    logits(model, IDS)
    return found


def test_rounding_activations_loses_less():
    wanted = logits(outlying(), IDS)
    before, after = losses(outlying()), losses(rotate(outlying()))
    for name in before:
        if "down_proj" in name:  # which no fused rotation reaches
            assert after[name] == pytest.approx(before[name], rel=1e-3)
        else:
            assert after[name] < 0.7 * before[name]
    settings = {"bits": 8, "act_bits": 4, "act_bits_pattern": {"down_proj": 8}}
    models = [adapted(one, **settings) for one in (outlying(), rotate(outlying()))]
    errors = [(logits(model, IDS) - wanted).norm() for model in models]
    assert errors[1] < 0.5 * errors[0]


# -- refused, and nothing is changed


def _gate(model: PreTrainedModel) -> None:
    attention = model.model.layers[1].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _, args: (args[0] * torch.linspace(0, 2, args[0].shape[-1]),))


def _clip(model: PreTrainedModel) -> None:
    model.model.layers[1].register_forward_hook(lambda _, args, output: output.clamp(-1, 1))


@pytest.mark.parametrize("spoil", [_gate, _clip])
def test_what_only_running_it_shows(spoil: Any):
    model = tiny(tie=True)
    spoil(model)
    state = state_of(model)
    with pytest.raises(ValueError, match=r"model.layers.1 \(LlamaDecoderLayer\) is the first part whose outputs.*fp32"):
        rotate(model)
    assert same(model, state)
    assert model.config.tie_word_embeddings
    assert not hasattr(model.config, KEY)
    assert not model.model.layers[0]._forward_pre_hooks
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_that_fails_in_trial_is_as_it_was():
    model = tiny()

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    parameters, state = dict(model.named_parameters()), state_of(model)
    with pytest.raises(RuntimeError, match="no"):
        rotate(model)
    handle.remove()
    assert same(model, state)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def _shared(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def _shared_values(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[1].self_attn.v_proj = model.model.layers[0].self_attn.v_proj
    return model


def _quantized(model: PreTrainedModel) -> PreTrainedModel:
    config = LRQATConfig(bits=4, group_size=-1, task_type="CAUSAL_LM")
    preprocess_gptq(model, config, [IDS], progressbar=False)
    return model


def _pruned(model: PreTrainedModel) -> PreTrainedModel:
    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)
    return model


def _large(model: PreTrainedModel) -> PreTrainedModel:
    model.half()
    model.model.norm.weight.data.fill_(6e4)
    model.lm_head.weight.data.fill_(10.0)
    return model


def _another_part(model: PreTrainedModel) -> PreTrainedModel:
    model.model.extra = nn.Linear(32, 32)
    return model


def _on_meta(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[1].mlp.to("meta")
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda model: model, {"residual": False, "values": False}, "both False"),
        (lambda model: model, {"residual": "no"}, "`residual` is 'no'; allowed are True, False"),
        (lambda model: model, {"seed": "x"}, "`seed` is 'x'"),
        (lambda model: get_peft_model(model, LoraConfig(target_modules="all-linear")), {}, "before `get_peft_model`"),
        (lambda model: get_peft_model(model, LRQATConfig(group_size=-1)).base_model.model, {}, "carries an adapter"),
        (_quantized, {}, "quantized or carries"),
        (_shared, {}, "'model.layers.0.mlp.up_proj.weight' is shared"),
        (_shared_values, {"residual": False}, "'model.layers.0.self_attn.v_proj.weight' is shared"),
        (_pruned, {}, "'model.layers.0.mlp.up_proj.weight_orig' does with the residual stream is not known"),
        (_another_part, {}, "'model.extra.weight' does with"),
        (_large, {}, "lm_head.weight would hold numbers too large for torch.float16"),
        (_on_meta, {}, "'model.layers.1.mlp.*' is sharded, or offloaded"),
        (lambda model: AutoModel.from_config(model.config), {}, "LlamaModel is not"),
        (lambda model: nn.Linear(2, 2), {}, "must be a model of transformers"),
    ],
)
def test_refusals(make: Any, options: dict[str, Any], message: str):
    model = make(tiny())
    state = {name: value for name, value in state_of(model).items() if not value.is_meta}
    with pytest.raises(ValueError, match=message):
        rotate(model, **options)
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_a_change_keeps_rows_together():
    weight = nn.Linear(4, 4)
    assert Change(weight, "weight", "w", torch.ones(4)).by_rows()
    assert not Change(weight, "weight", "w", torch.ones(4), gain_axis=-2).by_rows()
