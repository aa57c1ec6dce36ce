"""What `peft_lrqat/tuners/common/layer.py` gives the layers of both methods: merging, unmerging, mixed batches."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from peft_lrqat.modules.packed import QuantizedLinear
from tests.models import logits, tiny, tokens

IDS = tokens(batch=4)


def test_merging_and_unmerging_change_nothing(method: ModuleType, base: PreTrainedModel):
    model = method.random_adapter(base, bits=3)
    trained = logits(model, IDS)
    state = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    assert all(isinstance(layer.base_layer, QuantizedLinear) for layer in method.layers(model).values())
    assert torch.equal(logits(model, IDS), trained)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    assert torch.equal(logits(model, IDS), trained)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_a_cast_while_adapters_are_merged_reaches_the_base(method: ModuleType, base: PreTrainedModel):
    """Nobody finds the base then: it would make scales of the earlier dtype for a model of another one."""
    model = method.random_adapter(base)
    straight = copy.deepcopy(model).bfloat16()
    model.merge_adapter()
    model.bfloat16()
    model.unmerge_adapter()
    assert torch.equal(logits(model, IDS), logits(straight, IDS))
    found, expected = model.merge_and_unload().state_dict(), straight.merge_and_unload().state_dict()
    assert {name: value.dtype for name, value in found.items()} == {k: v.dtype for k, v in expected.items()}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_bias_of_another_dtype_stays_what_it_is(method: ModuleType):
    """Merging in place, as trainers do for every rollout, casts nothing where the model has not been cast."""
    base = tiny("qwen2", num_hidden_layers=1)
    for name, module in base.named_modules():
        if name.endswith("q_proj"):
            module.weight.data = module.weight.data.bfloat16()
            torch.nn.init.normal_(module.bias)
    biases = {name: tensor.clone() for name, tensor in base.named_parameters() if name.endswith("q_proj.bias")}
    model = method.random_adapter(base, target_modules=["q_proj"])
    model.merge_adapter()
    model.unmerge_adapter()
    for name, bias in biases.items():
        layer = model.get_base_model().get_submodule(name.removesuffix(".bias"))
        assert layer.frozen.bias.dtype == torch.float32
        assert torch.equal(layer.frozen.bias, bias)


def test_layers_have_no_modules_that_nothing_uses(method: ModuleType, base: PreTrainedModel):
    """A Trainer walks through all modules in every step."""
    model = method.random_adapter(base)
    for layer in method.layers(model).values():
        assert not any(kind in name for name, _ in layer.named_modules() for kind in ("embedding", "dropout", "magnit"))
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, IDS), logits(model, IDS))
    copied.delete_adapter("default")
    assert all(layer.active_adapters == [] for layer in method.layers(copied).values())


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_reaches_every_part(method: ModuleType, base: PreTrainedModel, mode: bool):
    model = method.random_adapter(base).train(mode)
    for layer in method.layers(model).values():
        for part in layer.modules():
            part.training = not mode
            model.train(mode)
            assert all(module.training == mode for module in model.modules())


def test_disabling_a_merged_adapter_gives_the_base(method: ModuleType, base: PreTrainedModel):
    before = logits(base, IDS)
    model = method.random_adapter(base)
    trained = logits(model, IDS)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), before)
    assert torch.equal(logits(model, IDS), trained)


def test_mixed_batches_use_each_samples_adapter(two_adapters: PeftModel):
    names = ["__base__", "default", "other", "default"]
    with torch.no_grad():
        mixed = two_adapters(IDS, adapter_names=names).logits
    with two_adapters.disable_adapter():
        expected = {"__base__": logits(two_adapters, IDS)}
    for name in ("default", "other"):
        two_adapters.set_adapter(name)
        expected[name] = logits(two_adapters, IDS)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    assert two_adapters.generate(input_ids=IDS, adapter_names=names, **options).shape == (4, IDS.shape[1] + 4)


def test_mixed_batches_are_refused_where_lora_refuses_them(two_adapters: PeftModel):
    with pytest.raises(ValueError, match="same as the number of inputs"):
        two_adapters(IDS, adapter_names=["default"])
    with pytest.raises(ValueError, match="non-existing adapter"):
        two_adapters(IDS, adapter_names=["unknown"] * 4)
    with pytest.raises(ValueError, match="training mode"):
        two_adapters.train()(IDS, adapter_names=["default"] * 4)
    two_adapters.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        two_adapters(IDS, adapter_names=["default"] * 4)


@pytest.mark.parametrize("kind", ["adapted", "merged"])
def test_second_derivatives_are_refused(method: ModuleType, kind: str):
    """W^ is built without a graph, so a gradient penalty would miss the part that goes through the weight."""
    net = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 8))
    model = method.adapt(net, **method.GRID, target_modules=["0"], task_type=None)
    model = model.merge_and_unload() if kind == "merged" else model
    x = torch.randn(3, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="`create_graph=True` asks for second derivatives"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    torch.autograd.grad(model(x).square().sum(), x)


@pytest.mark.parametrize("kind", ["adapted", "merged"])
def test_what_records_or_transforms_functions_is_refused_by_name(method: ModuleType, kind: str):
    net = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 8))
    model = method.adapt(net, **method.GRID, target_modules=["0"], task_type=None)
    model = model.merge_and_unload() if kind == "merged" else model
    x = torch.randn(3, 16)
    with pytest.raises(RuntimeError, match=r"`torch\.jit\.trace`.*`torch\.export\.export` can"):
        torch.jit.trace(model, x)
    for transformed in (torch.vmap(model), torch.func.grad(lambda x: model(x).sum())):
        with pytest.raises(RuntimeError, match=r"functorch transforms.*functional_call` works"):
            transformed(x)
    parameters = dict(model.named_parameters())
    assert torch.equal(torch.func.functional_call(model, parameters, (x,)), model(x))
