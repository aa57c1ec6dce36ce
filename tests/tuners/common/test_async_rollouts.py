"""TRL's asynchronous trainers announce the weights that they will send, and send no bare adapter."""

from __future__ import annotations

import importlib
import sys
import types
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_lrqat.tuners.common.async_rollouts import teach_async_trainers
from tests.models import tiny

pytest.importorskip("trl", minversion="1.15", reason="earlier versions take no PEFT models")
grpo = importlib.import_module("trl.experimental.async_grpo.async_grpo_trainer")
distillation = importlib.import_module("trl.experimental.async_distillation.async_distillation_trainer")

#: As somebody holds it who imported it before any model was converted.
walk_of_grpo, check_of_grpo = grpo._iter_vllm_named_params, grpo.validate_lora_for_vllm_sync
WALKS = [walk_of_grpo, lambda model: distillation._iter_vllm_named_params(model)]
CHECKS = [check_of_grpo, lambda model: distillation.validate_lora_for_vllm_sync(model)]


def described(named: object) -> list[tuple]:
    return [(name, parameter.dtype, tuple(parameter.shape)) for name, parameter in named]


@pytest.mark.parametrize("walk", WALKS, ids=["grpo", "distillation"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_what_is_announced_is_what_is_sent(method: ModuleType, family: str, walk):
    float_model = tiny(family, tie=True, dtype=torch.bfloat16)
    expected = described(float_model.named_parameters())
    model = method.random_adapter(float_model)
    stored = described(model.named_parameters())
    announced = described(walk(model))
    assert sorted(announced) == sorted(expected)
    assert described(model.named_parameters()) == stored
    model.merge_adapter()
    sent = list(walk(model))
    assert described(sent) == announced
    assert all(type(parameter.detach()) is torch.Tensor for _, parameter in sent)


def test_the_trainers_own_stream_agrees(method: ModuleType, base):
    model = method.random_adapter(base)
    announced = described(walk_of_grpo(model))
    sent = []

    def send(weights: object) -> None:
        sent.extend(weights)

    nothing = types.SimpleNamespace(send_weights=send, pause=lambda: None, resume=lambda: None)
    trainer = grpo.AsyncGRPOTrainer.__new__(grpo.AsyncGRPOTrainer)
    trainer.model, trainer.weight_transfer, trainer.model_version, trainer.rollout_worker = model, nothing, 0, None
    trainer.accelerator = types.SimpleNamespace(
        unwrap_model=lambda model: model,
        device=torch.device("cpu"),
        is_main_process=True,
        wait_for_everyone=lambda: None,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "logger", types.SimpleNamespace(info=lambda *args: None))
        trainer._sync_weight_merged(0.0)
    assert described(sent) == announced
    assert not any(layer.merged for layer in method.layers(model).values())
    served = model.merge_and_unload()
    for name, weight in sent:
        if "proj" in name and name.endswith("weight"):
            assert torch.equal(weight, served.get_submodule(name.removesuffix(".weight")).weight)


def test_layers_without_the_active_adapter_are_announced(two_adapters: PeftModel):
    two_adapters.set_adapter("other")
    announced = described(walk_of_grpo(two_adapters))
    two_adapters.merge_adapter()
    assert described(walk_of_grpo(two_adapters)) == announced


def test_rounded_inputs_are_refused_before_training(method: ModuleType, base):
    model = method.random_adapter(base, group_size=-1, bits=8, act_bits=8)
    before = described(model.named_parameters())
    with pytest.raises(ValueError, match=r"act_bits.*another policy"):
        list(walk_of_grpo(model))
    assert described(model.named_parameters()) == before


@pytest.mark.parametrize("check", CHECKS, ids=["grpo", "distillation"])
def test_a_bare_adapter_is_not_served(method: ModuleType, base, check):
    with pytest.raises(ValueError, match=r"is no LoRA adapter.*Sync merged weights instead"):
        check(method.random_adapter(base))


def test_the_trainer_then_sends_merged_weights(method: ModuleType, base, caplog):
    server = {
        "lora_config": {"max_lora_rank": 64, "max_loras": 64},
        "parallel_config": {"data_parallel_size": 1},
    }
    with pytest.MonkeyPatch.context() as patch:
        warned = []
        patch.setattr(grpo, "logger", types.SimpleNamespace(warning=warned.append))
        assert not grpo.select_adapter_sync(server, method.random_adapter(base), grpo.AsyncGRPOConfig)
    assert "is no LoRA adapter" in warned[0]


def test_other_models_are_as_before(method: ModuleType, base):
    method.random_adapter(base)
    lora = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    names = [name for name, _ in tiny().named_parameters()]
    assert [name for name, _ in walk_of_grpo(lora)] == names
    assert check_of_grpo(lora) is lora.peft_config["default"]
    assert [name for name, _ in walk_of_grpo(tiny())] == names


def test_an_unknown_version_is_reported(monkeypatch):
    name = grpo.__name__
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(is_peft_model=lambda model: True))
    with pytest.warns(UserWarning, match=r"in a way that this package does not know.*report your version of TRL"):
        teach_async_trainers()
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace())  # one that takes no PEFT models
    teach_async_trainers()


def test_the_list_is_made_without_a_byte(method: ModuleType, base):
    model = method.random_adapter(base)
    weights = [p for name, p in walk_of_grpo(model) if "proj.weight" in name]
    assert len(weights) == 14
    assert all(p.is_meta and isinstance(p, nn.Parameter) for p in weights)
