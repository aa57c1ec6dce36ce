"""Casting, autocast, checkpointing, compiling, copying and wrapping an adapted model."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from peft_lrqat import LowBitAdamW
from tests.lowbit_sr import IDS, layers, other, random_adapter
from tests.models import logits, tiny, train


def test_casting_the_model_changes_no_code(base: PreTrainedModel):
    model = random_adapter(base)
    before = {name: layer.lowbitsr_weight["default"].weight.codes() for name, layer in layers(model).items()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16):
        model.to(dtype)
        assert logits(model, IDS).dtype == dtype
    for name, layer in layers(model).items():
        assert torch.equal(layer.lowbitsr_weight["default"].weight.codes(), before[name])
        assert layer.lowbitsr_weight["default"].weight.scale.dtype == torch.float32


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_bf16_model_trains_with_fp32_gradients(autocast_adapter_dtype: bool):
    model = get_peft_model(
        tiny(dtype=torch.bfloat16), other(init_weights=True), autocast_adapter_dtype=autocast_adapter_dtype
    )
    before = [layer.lowbitsr_weight["default"].weight.codes() for layer in layers(model).values()]
    losses = train(model, IDS, steps=10, lr=1e-2)
    assert losses[-1] < losses[0]
    after = [layer.lowbitsr_weight["default"].weight.codes() for layer in layers(model).values()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_autocast_computes_in_bf16_and_gives_fp32_gradients(base: PreTrainedModel):
    layer = next(iter(layers(random_adapter(base)).values()))
    x = torch.randn(3, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.lowbitsr_weight["default"].weight.grad.dtype == torch.float32
    expected = layer(x)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


def test_fp16_autocast_is_refused_in_training_only(base: PreTrainedModel):
    model = random_adapter(base)
    with torch.autocast("cpu", torch.float16):
        with torch.no_grad():
            assert model(IDS).logits.isfinite().all()
        with pytest.raises(ValueError, match=r"cannot be trained under fp16 autocast.*bf16=True"):
            model(IDS)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_gradient_checkpointing_trains_the_same(base: PreTrainedModel, use_reentrant: bool, fused: bool):
    def run(checkpointing: bool) -> list[torch.Tensor]:
        model = random_adapter(copy.deepcopy(base), learn_scales=True, init_weights=True).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        optimizer = LowBitAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused_backward=fused)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [layer.lowbitsr_weight["default"].weight.codes() for layer in layers(model).values()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("options", [{}, {"learn_scales": True}, {"bits": 8, "forward_bits": 1.58}], ids=str)
def test_compiled_layers_have_no_graph_break(options: dict):
    layer = next(iter(layers(random_adapter(tiny(), **options)).values()))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        layer.zero_grad()
        x.grad = None
        y = run(x)
        y.square().sum().backward()
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        results.append([y.detach(), x.grad, *gradients])
    assert len(results[0]) == 4 if options.get("learn_scales") else 3
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_a_compiled_model_sees_what_the_optimizer_does(base: PreTrainedModel):
    model = random_adapter(base).train()
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model.model.layers[0].mlp, backend="aot_eager")
    x = torch.randn(2, 3, 32)
    before = compiled(x)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    before.square().sum().backward()
    optimizer.step()
    after = compiled(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model.base_model.model.model.layers[0].mlp(x))
