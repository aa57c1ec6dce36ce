"""Ternary training begins where pretrained weights lay, whatever happens between the conversion and the first step."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_lrqat import LowBitAdamW, LowBitSRConfig
from peft_lrqat.grid import grouped
from peft_lrqat.ops.latent import PARTS, REACH
from peft_lrqat.tuners.lowbit_sr import LowBitTensor
from tests.lowbit_sr import layers
from tests.models import low_bit, tiny, tokens

IDS = tokens()
TERNARY = {"bits": 1.58, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "group_size": -1}
#: Codes random within their cell are at most so far from them: 64ths of a step.
CELL = 31


def pretrained(family: str = "llama") -> PreTrainedModel:
    """A float model with a name, as those have that were loaded."""
    model = tiny(family)
    model.name_or_path = "someone/model"
    return model


def weights(model: nn.Module) -> list[LowBitTensor]:
    return [p for p in model.parameters() if isinstance(p, LowBitTensor)]


def first_latents(model: nn.Module, **options) -> list[torch.Tensor]:
    """x of all weights, fp32 (out, in), as training finds them: a step with a rate of 0 changes none."""
    optimizer = LowBitAdamW(weights(model), lr=0.0, **options)
    for p in weights(model):
        p.grad = torch.randn(p.shape)
    optimizer.step()
    return [p.codes().float() + optimizer.state[p]["latent_codes"].float() / PARTS for p in weights(model)]


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) > 0 and all(map(torch.equal, found, expected))


def anywhere(model: nn.Module, latents: list[torch.Tensor]) -> bool:
    """Whether the latents are as those of codes of which nobody knows more."""
    distances = torch.cat([((x - p.codes()) * PARTS).flatten() for x, p in zip(latents, weights(model), strict=True)])
    return distances.abs().max() <= CELL and abs(float(distances.std()) - 18.2) < 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("group_size", [-1, 0, 8])
def test_training_begins_where_the_float_weights_lay(family: str, group_size: int):
    model = pretrained(family)
    floats = {name: value.detach().clone() for name, value in model.named_parameters()}
    adapted = low_bit(model, bits=1.58, group_size=group_size)
    found = first_latents(adapted)
    for (name, layer), x in zip(layers(adapted.base_model.model).items(), found, strict=True):
        weight = layer.lowbitsr_weight["default"].weight
        w = floats[f"{name}.weight"].t() if layer.fan_in_fan_out else floats[f"{name}.weight"]
        levels = (grouped(w.contiguous(), weight.scale) / weight.scale.unsqueeze(-1)).view(w.shape)
        assert (levels.abs() > 1.5).any()  # beyond the outermost levels, too
        expected = levels.clamp(-1 - REACH, 1 + REACH)
        assert (x - expected).abs().max() <= 0.5001 / PARTS


def test_what_was_loaded_in_low_bits_begins_there_too(tmp_path: Path):
    tiny().save_pretrained(tmp_path)
    config = LowBitSRConfig(**TERNARY)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config.for_loading())
    expected = first_latents(low_bit(pretrained(), bits=1.58))
    assert equal(first_latents(get_peft_model(loaded, LowBitSRConfig(**TERNARY))), expected)


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded_again(model: nn.Module) -> nn.Module:
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    return model


@torch.no_grad()
def copied(model: nn.Module) -> nn.Module:
    twin = low_bit(pretrained(), bits=1.58)
    for p, other in zip(weights(model), weights(twin), strict=True):
        p.copy_(p.to_float())
        p.copy_(other)
    return model


def in_parallel(model: nn.Module) -> nn.Module:
    """DDP copies every parameter from the first process, also to that itself."""
    DistributedDataParallel(model)
    return model


@pytest.fixture
def alone(tmp_path: Path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "happens",
    [copy.deepcopy, pickled, loaded_again, copied, in_parallel, nn.Module.double, nn.Module.eval],
    ids=lambda happens: happens.__name__,
)
def test_nothing_that_leaves_the_codes_alone_changes_it(happens: Callable[[nn.Module], nn.Module], alone: None):
    expected = first_latents(low_bit(pretrained(), bits=1.58))
    model = happens(low_bit(pretrained(), bits=1.58))
    assert equal(first_latents(model), expected)


@pytest.mark.parametrize("keep_base", [True, False])
def test_an_adapter_saved_before_its_first_step_begins_there(keep_base: bool, tmp_path: Path):
    """Also where PEFT makes it without values, for those of the file."""
    model = low_bit(pretrained(), bits=1.58, keep_base=keep_base)
    model.save_pretrained(tmp_path)
    expected = first_latents(model)
    for low_memory in (False, True):
        options = {"is_trainable": True, "low_cpu_mem_usage": low_memory}
        again = PeftModel.from_pretrained(pretrained(), tmp_path, **options)
        assert equal(first_latents(again), expected)


@pytest.mark.parametrize("how", ["file", "low memory", "state", "copy", "values"])
def test_other_codes_are_not_put_where_the_float_weights_lay(how: str, tmp_path: Path):
    other = low_bit(pretrained(), bits=1.58, init_weights=False)
    assert not any(p.places is not None for p in weights(other))
    model = low_bit(pretrained(), bits=1.58)
    if how in ("file", "low memory"):
        other.save_pretrained(tmp_path)
        options = {"is_trainable": True, "low_cpu_mem_usage": how == "low memory"}
        model = PeftModel.from_pretrained(pretrained(), tmp_path, **options)
    elif how == "state":
        model.load_state_dict(other.state_dict())
    for p, found in zip(weights(model), weights(other), strict=True):
        if how in ("copy", "values"):
            with torch.no_grad():
                p.copy_(found if how == "copy" else found.to_float())
        assert torch.equal(p.packed, found.packed)
    assert anywhere(model, first_latents(model))


def test_other_scales_are_not_put_there_either():
    model = low_bit(pretrained(), bits=1.58)
    state = {name: 2 * t if "lowbitsr_scale" in name else t for name, t in model.state_dict().items()}
    model.load_state_dict(state)
    assert anywhere(model, first_latents(model))


def test_weights_on_the_levels_begin_anywhere_beside_them():
    """They were trained there, or not at all: nobody knows more, and they must not all wait for the same step."""
    model = pretrained()
    ternary = low_bit(pretrained(), bits=1.58).unload()
    model.load_state_dict(ternary.state_dict())
    model.model.layers[0].mlp.up_proj.weight.data[3] = 0.0
    adapted = low_bit(model, bits=1.58, range_method="minmax")
    assert anywhere(adapted, first_latents(adapted))
    model = pretrained()
    model.model.layers[0].mlp.up_proj.weight.data[3] = 0.0
    layer = low_bit(model, bits=1.58).base_model.model.model.layers[0].mlp.up_proj
    row = next(x[3] for p, x in zip([layer.lowbitsr_weight["default"].weight], first_latents(layer), strict=True))
    assert row.unique().numel() > 5


@pytest.mark.parametrize("kind", [LowBitAdamW, torch.optim.SGD])
@pytest.mark.parametrize("latent_weights", [None, False])
def test_after_the_first_step_nothing_is_kept(kind: type, latent_weights: bool | None):
    model = low_bit(pretrained(), bits=1.58)
    held = weights(model)
    views = [p.detach() for p in held]
    assert all(p.places.dtype == torch.int8 for p in held)
    options = {"latent_weights": latent_weights} if kind is LowBitAdamW else {}
    optimizer = kind(held, lr=1e-3, **options)
    for p in held:
        p.grad = torch.randn(p.shape)
    with contextlib.nullcontext() if kind is LowBitAdamW else pytest.warns(UserWarning, match="LowBitAdamW"):
        optimizer.step()
    assert all(p.places is None for p in held)
    assert all((view.places == -128).all() for view in views)  # who has the codes in common has changed ones


def test_who_does_not_train_from_floats_has_no_bytes_for_it():
    assert all(p.places is None for p in weights(low_bit(tiny(), bits=1.58)))  # from scratch
    assert all(p.places is None for p in weights(low_bit(pretrained(), bits=2)))
    assert all(p.places is None for p in weights(low_bit(pretrained(), bits=8, forward_bits=1.58, group_size=0)))
    assert all(p.places is None for p in weights(low_bit(pretrained(), bits=1.58, inference_mode=True)))
    model = low_bit(pretrained(), bits=1.58)
    model.add_adapter("second", LowBitSRConfig(**TERNARY))  # begins at the base's codes, of which floats are gone
    held = [layer.lowbitsr_weight["second"].weight for layer in layers(model).values()]
    assert held
    assert all(p.places is None for p in held)
    assert all(layer.base_layer.places is None for layer in layers(model).values())


def test_a_state_that_is_loaded_goes_on_where_it_was():
    model = low_bit(pretrained(), bits=1.58)
    optimizer = LowBitAdamW(weights(model), lr=1e-2)
    for p in weights(model):
        p.grad = torch.randn(p.shape)
    optimizer.step()
    twin = low_bit(pretrained(), bits=1.58)
    twin.load_state_dict(model.state_dict())
    second = LowBitAdamW(weights(twin), lr=1e-2)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, other in zip(weights(model), weights(twin), strict=True):
        p.grad = torch.randn(p.shape)
        other.grad = p.grad.clone()
    optimizer.step()
    second.step()
    for p, other in zip(weights(model), weights(twin), strict=True):
        assert torch.equal(optimizer.state[p]["latent_codes"], second.state[other]["latent_codes"])
        assert torch.equal(p.packed, other.packed)
