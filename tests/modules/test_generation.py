"""Dense weights that are kept while a model generates: when, which, how many; never another number."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationMixin, LogitsProcessorList

from peft_lrqat import kept_weights, limit_kept_weights, load_quantized
from peft_lrqat.modules import generation
from peft_lrqat.modules.packed import QuantizedLinear
from tests.models import adapted, tiny, tokens

IDS = tokens(batch=2)
GRID = {"bits": 4, "group_size": 8}


pytestmark = pytest.mark.usefixtures("nothing_stays")


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    return adapted(tiny(), **GRID, init_lora_weights=False).merge_and_unload().eval()


@pytest.fixture
def merged(quantized: nn.Module) -> nn.Module:
    return copy.deepcopy(quantized)


def held() -> int:
    return sum(generation._held.values())


def layers(model: nn.Module) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def dense_bytes(model: nn.Module) -> int:
    return sum(layer.out_features * layer.in_features for layer in layers(model)) * 4


def generate(model: Any, limit: int | None = None, each_step: Any = None, **options: Any) -> torch.Tensor:
    """The logits of a call; `each_step` is called before every token."""

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if each_step is not None:
            each_step()
        return scores

    limit_kept_weights(limit)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    out = model.generate(
        input_ids=IDS,
        logits_processor=LogitsProcessorList([process]),
        output_logits=True,
        return_dict_in_generate=True,
        **{**settings, **options},
    )
    return torch.stack(out.logits)


def test_weights_are_built_once_kept_and_freed(merged: nn.Module, monkeypatch: pytest.MonkeyPatch):
    expected, built, seen = generate(merged, 0), [], []
    build = QuantizedLinear._dense
    monkeypatch.setattr(QuantizedLinear, "_dense", lambda self, dtype: built.append(self) or build(self, dtype))
    assert torch.equal(generate(merged, each_step=lambda: seen.append(held())), expected)
    assert built == layers(merged)
    assert seen == [dense_bytes(merged)] * 4
    assert held() == 0
    assert torch.equal(generate(merged, 0), expected)
    assert len(built) == 14


def test_what_an_error_leaves_behind_is_nothing(merged: nn.Module):
    def stop() -> None:
        assert held()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(merged, each_step=stop)


@pytest.mark.parametrize("layers_of", [0, 1, 5])
def test_the_limit_holds(merged: nn.Module, layers_of: int):
    one, seen = 32 * 48 * 4, []
    expected = generate(merged, 0)
    assert torch.equal(generate(merged, layers_of * one, each_step=lambda: seen.append(held())), expected)
    assert max(seen) <= layers_of * one
    assert (max(seen) > 0) == (layers_of > 0)


@pytest.mark.parametrize("limit", [-1, 1.5, "1G", True])
def test_a_limit_is_a_number_of_bytes(limit: Any):
    with pytest.raises(ValueError, match="whole numbers of bytes"):
        limit_kept_weights(limit)


def test_the_default_limit_is_half_of_what_is_free(merged: nn.Module, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    monkeypatch.setattr(generation, "_free", lambda device: dense_bytes(merged))
    generate(merged, each_step=lambda: seen.append(held()))
    assert dense_bytes(merged) * 0.4 < max(seen) <= dense_bytes(merged) / 2


def test_free_memory_is_known():
    assert 0 < generation._free(torch.device("cpu")) < 2**50


def test_without_memory_it_goes_on_without(merged: nn.Module, monkeypatch: pytest.MonkeyPatch):
    expected, last = generate(merged, 0), layers(merged)[-1]
    build = QuantizedLinear._dense

    def out_of_memory(self: QuantizedLinear, dtype: torch.dtype) -> torch.Tensor:
        if self is last:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return build(self, dtype)

    seen: list[int] = []
    monkeypatch.setattr(QuantizedLinear, "_dense", out_of_memory)
    assert torch.equal(generate(merged, each_step=lambda: seen.append(held())), expected)
    assert seen == [0] * 4


def changes(layer: QuantizedLinear) -> dict[str, Any]:
    """Ways to change a layer's scales."""

    def new_buffer() -> None:
        layer.weight_scale = layer.weight_scale * 2

    def new_data() -> None:
        layer.weight_scale.data = layer.weight_scale * 2

    return {"in place": lambda: layer.weight_scale.mul_(2), "another tensor": new_buffer, "other memory": new_data}


@pytest.mark.parametrize("way", ["in place", "another tensor", "other memory"])
def test_a_change_between_two_tokens_is_seen(merged: nn.Module, way: str):
    models = [copy.deepcopy(merged), merged]
    found = [
        generate(model, limit, each_step=changes(layers(model)[-1])[way])
        for model, limit in zip(models, (0, None), strict=True)
    ]
    assert torch.equal(*found)
    assert not torch.equal(found[0], generate(models[0]))


def test_a_change_between_two_calls_is_seen_however_it_was_made(merged: nn.Module):
    before = generate(merged)
    layers(merged)[0].weight_scale.data.copy_(layers(merged)[0].weight_scale * 2)  # no version counts this
    after = generate(merged)
    assert not torch.equal(before, after)
    assert torch.equal(after, generate(merged, 0))


def test_a_forward_that_wants_gradients_drops_what_its_layer_keeps(merged: nn.Module):
    with kept_weights(merged):
        with torch.no_grad():
            merged(IDS)
        assert held() == dense_bytes(merged)
        x = torch.randn(1, 32, requires_grad=True)
        layers(merged)[0](x).sum().backward()
        assert held() == dense_bytes(merged) - 32 * 32 * 4
        merged(IDS)
        assert held() == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_loop_of_ones_own(merged: nn.Module, mode: Any):
    with mode():
        expected = merged(IDS).logits
        with kept_weights(merged), kept_weights(merged):
            assert torch.equal(merged(IDS).logits, expected)
            assert torch.equal(merged(IDS).logits, expected)
            assert held() == dense_bytes(merged)
        assert held() == 0


def test_a_name_is_no_model():
    with pytest.raises(ValueError, match=r"`model` is 'x'; it must be a model, an `nn.Module`\."), kept_weights("x"):
        pass


def test_a_part_that_generates_by_itself_stays_with_the_whole(merged: nn.Module):
    with torch.no_grad(), kept_weights(merged):
        with kept_weights(merged.model):
            merged(IDS)
        assert held() == dense_bytes(merged)


def test_copies_and_files_hold_nothing(merged: nn.Module):
    names = set(merged.state_dict())
    copies: list[Any] = []

    def keep() -> None:
        assert held()
        assert set(merged.state_dict()) == names
        copies.extend((copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))))

    expected = generate(merged, each_step=keep)
    assert all(not hasattr(layer, "slots") for layer in layers(merged))
    for copied in copies:
        assert torch.equal(generate(copied), expected)


def test_two_threads(merged: nn.Module):
    expected, found = generate(merged, 0), []
    limit_kept_weights(None)
    threads = [threading.Thread(target=lambda: found.append(generate(merged))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(logits, expected) for logits in found)
    assert len(found) == 2


def test_another_thread_that_generates_for_the_caller(merged: nn.Module):
    """As `generate_batch` does it; a real one would take most of the machine's memory for its cache."""
    seen: list[int] = []

    def forward() -> None:
        with torch.no_grad():
            merged(IDS)
        seen.append(held())

    with kept_weights(merged):
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
    assert seen == [dense_bytes(merged)]
    assert GenerationMixin.generate_batch.keeps_weights


def test_a_layer_whose_tensors_come_and_go_keeps_nothing(merged: nn.Module):
    managed, offloaded, *_, last = layers(merged)
    managed._is_fsdp_managed_module = True  # as FSDP2 marks the layers that it shards
    with kept_weights(merged):
        assert managed.slot() is None
    offloaded.to("meta")  # as accelerate leaves them between two calls
    with torch.no_grad(), kept_weights(merged):
        assert managed.slot() is None
        assert offloaded.slot() is None
        assert last.slot() is not None


def test_inference_tensors_count_no_writes(merged: nn.Module):
    with torch.inference_mode():
        layer = layers(merged)[0]
        layer.weight_scale = layer.weight_scale.clone()
        with kept_weights(merged):
            layer(torch.randn(1, 32))
            assert held() == 0


def test_compiled(merged: nn.Module):
    x, layer = torch.randn(2, 32), layers(merged)[0]
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad(), kept_weights(merged):
        expected = layer(x)
        layer.weight_scale.data.mul_(2)  # what a kept weight would not see
        assert torch.equal(compiled(x), 2 * expected)


def test_a_reloaded_checkpoint(merged: nn.Module, tmp_path: Any):
    merged.save_pretrained(tmp_path)
    seen: list[int] = []
    reloaded = load_quantized(tmp_path)
    assert torch.equal(generate(reloaded, each_step=lambda: seen.append(held())), generate(reloaded, 0))
    assert max(seen) == dense_bytes(merged)


def test_other_models_are_left_alone():
    model, seen = tiny(), []
    generate(model, each_step=lambda: seen.append(len(generation._SLOTS)))
    assert seen == [0] * 4


def test_it_is_set_up_once():
    before = GenerationMixin.generate
    generation.keep_in_generate()
    assert GenerationMixin.generate is before
    assert before.__name__ == "generate"
    assert before.__doc__
