"""TRL's asynchronous trainers announce the weights that they will send, and send no bare adapter."""

from __future__ import annotations

import sys
import types
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from trl.experimental.async_distillation import async_distillation_trainer
from trl.experimental.async_grpo import async_grpo_trainer
from trl.experimental.async_grpo.async_grpo_trainer import (
    AsyncGRPOConfig,
    AsyncGRPOTrainer,
    _iter_vllm_named_params,
    select_adapter_sync,
    validate_lora_for_vllm_sync,
)

from peft_lrqat.tuners.common.async_rollouts import teach_async_trainers
from tests.models import tiny

#: The functions as somebody holds them who imported them before any model was converted, and as the modules have them.
WALKS = [_iter_vllm_named_params, lambda model: async_distillation_trainer._iter_vllm_named_params(model)]
CHECKS = [validate_lora_for_vllm_sync, lambda model: async_distillation_trainer.validate_lora_for_vllm_sync(model)]


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
    announced = described(_iter_vllm_named_params(model))
    sent = []

    def send(weights: object) -> None:
        sent.extend(weights)

    nothing = types.SimpleNamespace(send_weights=send, pause=lambda: None, resume=lambda: None)
    trainer = AsyncGRPOTrainer.__new__(AsyncGRPOTrainer)
    trainer.model, trainer.weight_transfer, trainer.model_version, trainer.rollout_worker = model, nothing, 0, None
    trainer.accelerator = types.SimpleNamespace(
        unwrap_model=lambda model: model,
        device=torch.device("cpu"),
        is_main_process=True,
        wait_for_everyone=lambda: None,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_grpo_trainer, "logger", types.SimpleNamespace(info=lambda *args: None))
        trainer._sync_weight_merged(0.0)
    assert described(sent) == announced
    assert not any(layer.merged for layer in method.layers(model).values())
    served = model.merge_and_unload()
    for name, weight in sent:
        if "proj" in name and name.endswith("weight"):
            assert torch.equal(weight, served.get_submodule(name.removesuffix(".weight")).weight)


def test_layers_without_the_active_adapter_are_announced(two_adapters: PeftModel):
    two_adapters.set_adapter("other")
    announced = described(_iter_vllm_named_params(two_adapters))
    two_adapters.merge_adapter()
    assert described(_iter_vllm_named_params(two_adapters)) == announced


def test_rounded_inputs_are_refused_before_training(method: ModuleType, base):
    model = method.random_adapter(base, group_size=-1, bits=8, act_bits=8)
    before = described(model.named_parameters())
    with pytest.raises(ValueError, match=r"act_bits.*another policy"):
        list(_iter_vllm_named_params(model))
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
        patch.setattr(async_grpo_trainer, "logger", types.SimpleNamespace(warning=warned.append))
        assert not select_adapter_sync(server, method.random_adapter(base), AsyncGRPOConfig)
    assert "is no LoRA adapter" in warned[0]


def test_other_models_are_as_before(method: ModuleType, base):
    method.random_adapter(base)
    lora = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    names = [name for name, _ in tiny().named_parameters()]
    assert [name for name, _ in _iter_vllm_named_params(lora)] == names
    assert validate_lora_for_vllm_sync(lora) is lora.peft_config["default"]
    assert [name for name, _ in _iter_vllm_named_params(tiny())] == names


def test_an_unknown_version_is_reported(monkeypatch):
    name = async_grpo_trainer.__name__
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(is_peft_model=lambda model: True))
    with pytest.warns(UserWarning, match=r"in a way that this package does not know.*report your version of TRL"):
        teach_async_trainers()
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace())  # one that takes no PEFT models
    teach_async_trainers()


def test_the_list_is_made_without_a_byte(method: ModuleType, base):
    model = method.random_adapter(base)
    weights = [p for name, p in _iter_vllm_named_params(model) if "proj.weight" in name]
    assert len(weights) == 14
    assert all(p.is_meta and isinstance(p, nn.Parameter) for p in weights)
