"""Casting, autocast, checkpointing, compiling, copying and wrapping an adapted model."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from peft_lrqat import LRQATConfig
from tests.lrqat import ATTENTION, GRID, IDS, codes_of, layers, random_adapter
from tests.models import logits, tiny, train


@pytest.mark.parametrize("downcast", ["fx8", "int", "bf16", "fp16", "fp32"])
def test_casting_the_model_changes_no_code(base: PreTrainedModel, downcast: str):
    model = random_adapter(base, downcast=downcast)
    layer = next(iter(layers(model).values()))
    stored = {name: p.detach().clone() for name, p in layer.base_layer.named_parameters()}
    adapter_only = codes_of(layer)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert logits(model, IDS).dtype == dtype
    assert all(torch.equal(p, stored[name]) for name, p in layer.base_layer.named_parameters())
    assert torch.equal(codes_of(layer), adapter_only)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapters_of_a_bf16_model(autocast_adapter_dtype: bool):
    config = LRQATConfig(**GRID, target_modules=ATTENTION)
    model = get_peft_model(tiny(dtype=torch.bfloat16), config, autocast_adapter_dtype=autocast_adapter_dtype)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32 if autocast_adapter_dtype else torch.bfloat16}
    before = [layer.lora_scale_shift["default"].weight.detach().clone() for layer in layers(model).values()]
    train(model, IDS, steps=2, lr=1e-3)
    moved = [layer.lora_scale_shift["default"].weight for layer in layers(model).values()]
    assert all(not torch.equal(a, b) for a, b in zip(before, moved, strict=True))


def test_autocast_computes_in_bf16_and_returns_fp32_gradients(base: PreTrainedModel):
    model = random_adapter(base)
    layer = next(iter(layers(model).values()))
    x = torch.randn(3, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.lora_scale_shift["default"].weight.grad.dtype == torch.float32
    expected = layer(x)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(base: PreTrainedModel, use_reentrant: bool):
    model = random_adapter(base).train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    found = gradients()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compiled_layers_have_no_graph_break(symmetric: bool):
    model = random_adapter(tiny(), symmetric=symmetric)
    layer = next(iter(layers(model).values()))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        layer.zero_grad()
        x.grad = None
        y = run(x)
        y.square().sum().backward()
        results.append(
            [y.detach(), x.grad, layer.lora_A["default"].weight.grad, layer.lora_scale_shift["default"].weight.grad]
        )
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)
