"""What benchmarks/counted.py counts is what a model and its optimizer hold."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_lrqat import LowBitAdamW, LowBitSRConfig, LRQATConfig

ROOT = Path(__file__).resolve().parents[1]
_COMMON = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
_INT4 = {"r": 4, "bits": 4, "downcast": "int", "range_method": "minmax"}
#: the method as it is counted, and its configuration
METHODS = {
    "lora": ((16, None, 4, None), LoraConfig(r=4, **_COMMON)),
    "fx8, by group": ((8, 64, 4, "group"), LRQATConfig(r=4, group_size=64, range_method="minmax", **_COMMON)),
    "int4, per channel": ((4, -1, 4, "group"), LRQATConfig(group_size=-1, **_INT4, **_COMMON)),
    "int4, by channel": ((4, 64, 4, "channel"), LRQATConfig(group_size=64, learn_scales="channel", **_INT4, **_COMMON)),
    "int4, fixed": ((4, 64, 4, None), LRQATConfig(group_size=64, learn_scales=False, **_INT4, **_COMMON)),
    "low-bit SR": ((4, -1, 0, None), LowBitSRConfig(bits=4, group_size=-1, keep_base=False, **_COMMON)),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_counted_is_what_is_held(name: str, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    counted = importlib.import_module("counted")
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4)
    ).to(torch.bfloat16)
    method, config = METHODS[name]
    found = counted.parts(model, counted.Method(*method, measured=""), tokens=16)
    assert found.pop("inputs of blocks, kept by checkpointing") == 2 * 16 * 128 * 2
    state = found.pop("the optimizer's state")
    model = get_peft_model(model, config)
    held = 0
    for parameter in model.parameters():
        packed = getattr(parameter, "packed", None)  # a low-bit weight is as large as its codes and scales
        held += parameter.nbytes if packed is None else packed.nbytes + parameter.scale.nbytes
    assert held == sum(found.values())

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "low-bit SR":
        optimizer: torch.optim.Optimizer = LowBitAdamW(trained, lr=1e-4, state="factored")
    else:
        optimizer = torch.optim.AdamW(trained)
    model(input_ids=torch.zeros(1, 2, dtype=torch.long), labels=torch.zeros(1, 2, dtype=torch.long)).loss.backward()
    optimizer.step()
    kept = [value for values in optimizer.state.values() for key, value in values.items() if key != "step"]
    assert state == sum(value.nbytes for value in kept if isinstance(value, torch.Tensor))
