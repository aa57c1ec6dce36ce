"""A float model that takes what TRL's own code hands to `load_weights`, as vLLM does."""

from __future__ import annotations

import contextlib
import copy
import types
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from trl.generation.vllm_generation import VLLMGeneration


class Engine:
    """A float model, started from the float checkpoint, and loaded as vLLM is."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.loaded = copy.deepcopy(model), []

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            assert type(weight) in (torch.Tensor, nn.Parameter)  # nothing that a collective call could not send
            here = self._place(name)
            assert (weight.shape, weight.dtype) == (here.shape, here.dtype), name
            assert weight.untyped_storage().nbytes() == weight.nbytes
            here.data.copy_(weight)
            self.loaded.append(name)

    def _place(self, name: str) -> torch.Tensor:
        """Where a weight belongs; AttributeError: a name that the engine does not know."""
        layer, _, inner = name.partition(".experts.")
        if not inner:
            return self.model.get_parameter(name)
        experts, (e, part, _) = self.model.get_submodule(f"{layer}.experts"), inner.split(".")
        if part == "down_proj":
            return experts.down_proj[int(e)]
        return experts.gate_up_proj[int(e)].chunk(2)[("gate_proj", "up_proj").index(part)]


def colocated(kind: type, model: PeftModel, engine: Engine) -> Any:
    """TRL's syncing side with an engine in its process, as it is after `__init__`, whatever TRL's version."""
    syncing = kind.__new__(kind)
    state = types.SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=None)
    syncing.model, syncing.accelerator = model, types.SimpleNamespace(state=state, is_main_process=True)
    syncing._dist = types.SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: contextlib.nullcontext())
    syncing.is_fsdp_enabled = syncing.enable_sleep_mode = False
    syncing.mode = syncing.vllm_mode = "colocate"
    runner = types.SimpleNamespace(model_runner=types.SimpleNamespace(model=engine))
    executor = types.SimpleNamespace(driver_worker=runner)
    llm_engine = types.SimpleNamespace(model_executor=executor)
    syncing.llm = types.SimpleNamespace(llm_engine=llm_engine, reset_prefix_cache=lambda: None)
    return syncing


def sync(model: PeftModel, engine: Engine) -> None:
    colocated(VLLMGeneration, model, engine).sync_weights()
