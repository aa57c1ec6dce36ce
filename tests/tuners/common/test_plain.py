"""What users hang on a layer is kept through conversion, merging and unloading; what changes its product is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers import BartConfig, BartModel, FalconConfig, FalconForCausalLM, Llama4Config
from transformers.models.llama4.modeling_llama4 import Llama4Router

from peft_lrqat import LRQATConfig
from tests.models import logits, tiny, tokens


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def convert(method: ModuleType, net: nn.Module, **options: Any) -> Any:
    return get_peft_model(net, method.config(group_size=-1, **{"target_modules": ["first", "second"], **options}))


def test_hooks_and_attributes_stay_on_the_layer(method: ModuleType):
    net, x, seen = Net(), torch.randn(4, 16), []
    plain = convert(method, copy_of(net)).unload()
    handle = net.first.register_forward_hook(lambda m, args, y: 2 * y)
    net.first.register_full_backward_hook(lambda m, grads, outputs: seen.append(outputs[0].shape))
    net.first.layer_index = 3
    net.first.notes = notes = ["mine"]
    model = convert(method, net)
    layer: Any = model.base_model.model.first
    assert layer.layer_index == 3
    assert layer.notes is notes
    doubled = plain.second(torch.relu(2 * plain.first(x)))
    assert torch.equal(model(x), doubled)
    model(x).sum().backward()
    assert seen == [torch.Size([4, 24])]
    model.merge_adapter()
    assert torch.equal(model(x), doubled)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert torch.equal(merged(x), doubled)
    assert merged.first.notes is notes
    handle.remove()
    assert torch.equal(merged(x), plain(x))


def copy_of(net: Net) -> Net:
    other = Net()
    other.load_state_dict(net.state_dict())
    return other


def test_hooks_come_back_when_an_adapter_is_unloaded(method: ModuleType):
    net, x = Net(), torch.randn(4, 16)
    plain = convert(method, copy_of(net)).unload()
    net.second.register_forward_hook(lambda m, args, y: y + 1)
    unloaded = convert(method, net).unload()
    assert type(unloaded.second) is nn.Linear
    assert torch.equal(unloaded(x), plain(x) + 1)


def test_a_hook_that_is_a_method_is_not_copied_with_an_embedding():
    class Counter:
        def __init__(self) -> None:
            self.calls = 0

        def count(self, module: nn.Module, args: tuple, y: torch.Tensor) -> None:
            self.calls += 1

    counter, model = Counter(), tiny()
    model.get_input_embeddings().register_forward_hook(counter.count)
    adapted = get_peft_model(model, LRQATConfig(group_size=-1, r=2, target_modules=["embed_tokens"]))
    expected = logits(adapted.eval(), tokens())
    merged = adapted.merge_and_unload()
    assert torch.equal(logits(merged, tokens()), expected)
    assert counter.calls == 2


# -- refused


class Tripled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(input)


class Noisy(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("noise", torch.zeros(1))


def _own_forward(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda x: 3 * nn.functional.linear(x, layer.weight)  # type: ignore[method-assign]
    return layer


def _state_hook(layer: nn.Linear) -> nn.Linear:
    layer.register_state_dict_post_hook(lambda *args: None)
    return layer


def _load_hook(layer: nn.Linear) -> nn.Linear:
    layer.register_load_state_dict_pre_hook(lambda *args: None)
    return layer


REFUSED: dict[str, tuple[Callable[[nn.Linear], nn.Module], str]] = {
    "subclass": (lambda layer: Tripled(16, 24), r"\(Tripled\) has a `forward` of its own"),
    "instance": (_own_forward, "has a `forward` of its own"),
    "parametrization": (parametrizations.weight_norm, r"parametrized tensors \(_WeightNorm\).*remove_parametrizations"),
    "orthogonal": (parametrizations.spectral_norm, r"parametrized tensors \(_SpectralNorm\)"),
    "old weight_norm": (weight_norm, "'weight_g', 'weight_v'.*remove_weight_norm"),
    "old spectral_norm": (spectral_norm, "'weight_orig', 'weight_u', 'weight_v'.*remove_spectral_norm"),
    "mask": (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "'weight_mask', 'weight_orig'.*prune"),
    "mask of the bias": (lambda layer: prune.random_unstructured(layer, "bias", 0.5), "'bias_mask', 'bias_orig'"),
    "further tensor": (lambda layer: Noisy(16, 24), "'noise' beside weight and bias"),
    "state dict hook": (_state_hook, "hooks of its state dict"),
    "load hook": (_load_hook, "hooks of its state dict"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_would_be_lost_is_refused_by_name(method: ModuleType, kind: str):
    change, message = REFUSED[kind]
    net, x = Net(), torch.randn(4, 16)
    net.first = change(net.first)  # type: ignore[assignment]
    net.eval()  # a step of spectral_norm's iteration otherwise
    expected, before = net(x).detach(), dict(net.named_modules())
    with pytest.raises(ValueError, match=rf"'first'.*{message}.*`exclude_modules`"):
        convert(method, net)
    assert dict(net.named_modules()) == before
    torch.testing.assert_close(net(x), expected)


def test_all_linear_leaves_layers_with_a_forward_of_their_own_out(method: ModuleType):
    net = Net()
    net.first = Tripled(16, 24)
    with pytest.warns(UserWarning, match=r"leaves 1 layers out \(Tripled, e.g. 'first'\)"):
        model = convert(method, net, target_modules="all-linear")
    assert model.base_model.model.first is net.first
    assert set(model.peft_config["default"].target_modules) == {"second"}


def test_transformers_own_subclasses(method: ModuleType):
    # whose forward is nn.Linear's, written anew
    config = FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, bias=True)
    model = FalconForCausalLM(config).eval()
    with warnings.catch_warnings(action="error", category=UserWarning):
        adapted = get_peft_model(model, method.config(group_size=-1, **method.MOVED)).eval()
    assert len(method.layers(adapted)) == 4
    trained = logits(adapted, tokens())
    assert torch.equal(logits(adapted.merge_and_unload(), tokens()), trained)
    # which chooses experts
    router = Llama4Router(Llama4Config().get_text_config())
    with pytest.raises(ValueError, match=r"Llama4Router\) has a `forward` of its own"):
        convert(method, nn.ModuleDict({"first": router}), target_modules=["first"])


def test_barts_embeddings_are_scaled():
    sides = {
        f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    encoder = BartModel(BartConfig(**sides, vocab_size=96, d_model=16, scale_embedding=True)).encoder
    net: Any = nn.ModuleDict({"table": encoder.embed_tokens, "positions": encoder.embed_positions})
    table = net.table
    options = {"group_size": -1, "bits": 8, "r": 2}
    with pytest.raises(ValueError, match=r"BartLearnedPositionalEmbedding.*`forward` of its own"):
        get_peft_model(net, LRQATConfig(**options, target_modules=["positions"]))
    expected = table(tokens()).detach()
    model = get_peft_model(net, LRQATConfig(**options, target_modules=["table"]))
    found = model.base_model.model.table(tokens())
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    assert torch.equal(model.merge_and_unload().table(tokens()), found)


# -- accelerate


def test_a_dispatched_model_keeps_accelerates_hooks(method: ModuleType):
    plain = convert(method, tiny(), target_modules="all-linear").eval()
    parts = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"), "cpu")
    dispatched = dispatch_model(tiny(), {**parts, "model.rotary_emb": "cpu"}, force_hooks=True)
    model = convert(method, dispatched, target_modules="all-linear").eval()
    layers = method.layers(model)
    assert len(layers) == 14
    assert all(hasattr(layer, "_hf_hook") for layer in layers.values())
    assert torch.equal(logits(model, tokens()), logits(plain, tokens()))
    merged = model.merge_and_unload()
    assert hasattr(merged.model.layers[0].mlp.up_proj, "_hf_hook")
    assert torch.equal(logits(merged, tokens()), logits(plain, tokens()))


def test_an_offloaded_model_is_refused(method: ModuleType):
    model = cpu_offload(tiny(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"offloaded by accelerate.*without offloading"):
        convert(method, model, target_modules="all-linear")
