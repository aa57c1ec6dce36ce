"""Generating with adapters: the same numbers as without kept weights, whatever the layers and however they are used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessorList

from peft_lrqat import kept_weights, limit_kept_weights
from peft_lrqat.modules import generation
from tests import lowbit_sr, lrqat
from tests.models import logits, tiny, train

pytestmark = pytest.mark.usefixtures("nothing_stays")


def generate(model: Any, limit: int | None, each_step: Callable | None = None, **options: Any) -> torch.Tensor:
    """The logits of a call; `each_step` is called before every token."""

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if each_step is not None:
            each_step()
        return scores

    limit_kept_weights(limit)
    out = model.generate(
        input_ids=lrqat.IDS,
        logits_processor=LogitsProcessorList([process]),
        output_logits=True,
        return_dict_in_generate=True,
        **{"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **options},
    )
    return torch.stack(out.logits)


def keeps_and_equals(model: Any, **options: Any) -> torch.Tensor:
    """Assert that a call keeps weights, and that its logits are those of a call that keeps none; return them."""
    seen: list[int] = []
    found = generate(model, None, each_step=lambda: seen.append(sum(generation._held.values())), **options)
    assert torch.equal(found, generate(model, 0, **options))
    assert min(seen) > 0
    return found


def test_every_state_of_a_model(method: ModuleType):
    model = method.random_adapter(tiny())
    adapted = keeps_and_equals(model)
    with model.disable_adapter():
        assert not torch.equal(keeps_and_equals(model), adapted)
    model.merge_adapter()
    assert torch.equal(keeps_and_equals(model), adapted)
    model.unmerge_adapter()
    assert torch.equal(keeps_and_equals(model), adapted)
    assert torch.equal(keeps_and_equals(copy.deepcopy(model)), adapted)
    assert torch.equal(keeps_and_equals(model.merge_and_unload()), adapted)


_OPTIONS: dict[str, tuple[tuple[ModuleType, ...], dict[str, Any], dict[str, Any]]] = {
    "bf16": ((lrqat, lowbit_sr), {"dtype": torch.bfloat16}, {}),
    "Conv1D": ((lrqat, lowbit_sr), {"family": "gpt2"}, {}),
    "biases": ((lrqat, lowbit_sr), {"family": "qwen2"}, {}),
    "rounded inputs": ((lrqat, lowbit_sr), {}, {"act_bits": 8, "group_size": -1}),
    "zero points": ((lrqat,), {}, {"bits": 2, "symmetric": False}),
    "packed base": ((lrqat,), {}, {"downcast": "int"}),
    "scales by channel": ((lrqat,), {}, {"learn_scales": "channel"}),
    "no scales": ((lrqat,), {}, {"learn_scales": False}),
    "embeddings": ((lrqat,), {}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings, scales by channel": (
        (lrqat,),
        {},
        {"target_modules": ["embed_tokens", "q_proj"], "learn_scales": "channel"},
    ),
    "learned scales": ((lowbit_sr,), {}, {"learn_scales": True}),
    "projection": ((lowbit_sr,), {}, {"bits": 8, "forward_bits": 1.58, "group_size": 0}),
    "BitNet": ((lowbit_sr,), {}, {"bits": 1.58, "group_size": 0, "act_bits": 8, "export_format": "bitnet"}),
    "BitNet, projected": (
        (lowbit_sr,),
        {},
        {"bits": 8, "forward_bits": 1.58, "group_size": 0, "act_bits": 8, "export_format": "bitnet"},
    ),
}


@pytest.mark.parametrize(
    ("of", "architecture", "options"),
    [
        pytest.param(of, architecture, options, id=f"{of.TYPE}, {name}")
        for name, (methods, architecture, options) in _OPTIONS.items()
        for of in methods
    ],
)
def test_every_kind_of_layer(of: ModuleType, architecture: dict, options: dict):
    model = of.random_adapter(tiny(**architecture), **options)
    adapted = keeps_and_equals(model)
    model.merge_adapter()
    assert torch.equal(keeps_and_equals(model), adapted)
    merged = model.merge_and_unload()
    if architecture.get("family") != "gpt2":  # a dense layer
        keeps_and_equals(merged)


def test_autocast(method: ModuleType):
    model = method.random_adapter(tiny())
    plain = keeps_and_equals(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(keeps_and_equals(model), plain)
        keeps_and_equals(model.merge_and_unload())


def test_an_adapter_changed_between_two_tokens(method: ModuleType, two_adapters: Any):
    model, names = two_adapters, ["other", "default", "other", "default"]

    def switched(limit: int | None) -> torch.Tensor:
        order = iter(names)
        return generate(model, limit, each_step=lambda: model.set_adapter(next(order)))

    assert torch.equal(switched(None), switched(0))
    assert not torch.equal(switched(None), keeps_and_equals(model))


def test_adapters_that_add_up():
    model = lrqat.two_adapters(tiny())
    model.base_model.set_adapter(["default", "other"])
    keeps_and_equals(model)


def test_a_strength_changed_between_two_tokens():
    start = lrqat.random_adapter(tiny())

    def scaled(limit: int | None) -> torch.Tensor:
        model = copy.deepcopy(start)

        def scale() -> None:
            for layer in lrqat.layers(model).values():
                layer.scale_layer(0.5)

        return generate(model, limit, each_step=scale)

    assert torch.equal(scaled(None), scaled(0))


def test_a_mixed_batch(two_adapters: Any):
    keeps_and_equals(two_adapters, adapter_names=["default", "other", "__base__", "other"])


def test_training_between_calls(method: ModuleType):
    model = method.adapt(tiny(), **method.GRID)
    before = keeps_and_equals(model)
    train(model, method.IDS, steps=1)
    assert not torch.equal(keeps_and_equals(model), before)


def test_an_optimizer_that_steps_between_two_tokens(method: ModuleType):
    start = method.adapt(tiny(), **method.GRID)

    def trained(limit: int | None) -> torch.Tensor:
        model = copy.deepcopy(start)

        def step() -> None:
            with torch.enable_grad():
                train(model, method.IDS, steps=1)

        return generate(model, limit, each_step=step)

    assert torch.equal(trained(None), trained(0))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_after_a_forward_without_gradients(method: ModuleType, fused: bool):
    """A fused step does not count as a write to torch, and the weight was kept between backward and step."""
    model = method.adapt(tiny(), **method.GRID).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1, fused=fused)
    with kept_weights(model):
        model(input_ids=method.IDS, labels=method.IDS).loss.backward()
        before = logits(model, method.IDS)
        optimizer.step()
        after = logits(model, method.IDS)
    assert torch.equal(after, logits(model, method.IDS))
    assert not torch.equal(after, before)


def test_beams_and_no_cache(method: ModuleType):
    model = method.random_adapter(tiny())
    keeps_and_equals(model, num_beams=2)
    keeps_and_equals(model, use_cache=False)


def test_a_float_adapter_on_a_merged_model(method: ModuleType):
    merged = method.random_adapter(tiny()).merge_and_unload()
    keeps_and_equals(get_peft_model(merged, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)))


def test_trl_generates_with_kept_weights(method: ModuleType):
    from accelerate import Accelerator
    from trl.models import unwrap_model_for_generation

    model = method.random_adapter(tiny()).train()
    with unwrap_model_for_generation(model, Accelerator(cpu=True)) as unwrapped:
        keeps_and_equals(unwrapped)
