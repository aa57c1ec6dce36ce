"""Which engines are said to load a checkpoint; the rules themselves come from real runs (`make engines`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, LlamaConfig, T5Config, ViTConfig, WhisperConfig

from peft_lrqat.checkpoint.engines import engines
from peft_lrqat.formats.source import LayerInfo
from peft_lrqat.grid import Grid
from peft_lrqat.ops.activations import Activations

INT8 = Activations("compressed-tensors")


def linear(bits: int, group: int, act: Activations | None = None, size: int = 64) -> LayerInfo:
    return LayerInfo(size, size, Grid(bits, group), "linear", False, torch.bfloat16, bits, act)


def verdicts(format: str, bits: int, group: int, act: Activations | None = None, size: int = 64) -> dict[str, bool]:
    info = linear(bits, group, act, size)
    return {engine.name: engine.loads for engine in engines(format, [info], bits, group or -1)}


@pytest.mark.parametrize(("format", "bits", "group", "engine", "loads"), [
    ("compressed-tensors", 4, 32, "vLLM on a CPU", True),
    ("compressed-tensors", 3, 32, "vLLM on a CPU", False),
    ("compressed-tensors", 8, 32, "vLLM on a GPU", True),
    ("gptq", 3, 32, "vLLM on a CPU", False),
    ("gptq", 4, -1, "onnxruntime-genai, by its model builder", False),
    ("torchao", 2, 32, "vLLM on a CPU + torchao", True),
    ("torchao", 5, 32, "vLLM on a CPU + torchao", False),
    ("bitnet", 2, 0, "vLLM", False),
])  # fmt: skip
def test_the_rules(format: str, bits: int, group: int, engine: str, loads: bool):
    assert verdicts(format, bits, group)[engine] is loads


@pytest.mark.parametrize(
    ("config", "architecture", "loads"),
    [
        (LlamaConfig(), "LlamaForCausalLM", True),
        (WhisperConfig(), "WhisperForConditionalGeneration", True),
        (T5Config(), "T5ForConditionalGeneration", False),
        (ViTConfig(), "ViTForImageClassification", False),
        (BertConfig(), "BertForMaskedLM", False),
        (BertConfig(), "BertForSequenceClassification", True),
    ],
)
def test_which_architectures_vllm_has(config: Any, architecture: str, loads: bool):
    config.architectures = [architecture]
    info = LayerInfo(64, 64, Grid(4, 32), "linear", False, torch.bfloat16, 4)
    found = {engine.name: engine for engine in engines("compressed-tensors", [info], 4, 32, config=config)}
    assert found["vLLM on a CPU"].loads is loads
    assert loads or architecture in found["vLLM on a CPU"].why


def test_what_transformers_cannot_load_is_said():
    info = LayerInfo(64, 64, Grid(4, 32), "linear", False, torch.bfloat16, 4)
    found = engines("compressed-tensors", [info], 4, 32, problem="a reason")
    assert (found[0].loads, found[0].why) == (False, "a reason")
    assert found[1].loads


def test_mixtures():
    info = LayerInfo(64, 64, Grid(4, 32), "linear", False, torch.bfloat16, 4)
    for format, loads in (("compressed-tensors", True), ("gptq", False), ("torchao", False)):
        found = engines(format, [info], 4, 32, experts={"gate_proj", "up_proj", "down_proj"})
        assert next(engine for engine in found if "transformers" in engine.name).loads is loads
        assert not any(engine.run for engine in found if "GPU" in engine.name)
        on_a_cpu = next(engine for engine in found if "vLLM on a CPU" in engine.name)
        assert format == "torchao" or (not on_a_cpu.loads and "AMX" in on_a_cpu.why)
        assert all(engine.loads and engine.run for engine in found if engine.name == "gptqmodel")
    of_mixtral = engines("gptq", [info], 4, 32, experts={"w1", "w2", "w3"})[0]
    assert (of_mixtral.name, of_mixtral.loads) == ("gptqmodel", False)
    assert "not for w1" in of_mixtral.why


def test_int8_activations_and_odd_layers():
    assert all(verdicts("compressed-tensors", 8, -1, Activations("vllm")).values())
    for bits, group, how in ((4, -1, Activations("humming")), (8, 32, INT8), (8, -1, Activations("humming", 4))):
        found = verdicts("compressed-tensors", bits, group, how)
        assert found == {"transformers + compressed-tensors": True, "vLLM on a CPU": False, "vLLM on a GPU": True}
    assert not verdicts("compressed-tensors", 4, -1, size=40)["vLLM on a CPU"]
    steps = [e.why for e in engines("compressed-tensors", [linear(8, -1, INT8)], 8, -1) if "vLLM" in e.name]
    assert all("not the 127.5 of training" in why for why in steps)


def test_layers_with_float_activations_beside_others_count_too():
    """8-bit weights with float activations have no kernel in vLLM's CPU build, whatever stands beside them."""
    found = engines("compressed-tensors", [linear(8, -1, Activations("vllm")), linear(8, -1)], 8, -1)
    cpu = next(engine for engine in found if engine.name == "vLLM on a CPU")
    assert (cpu.loads, cpu.why) == (False, "no kernel for 8-bit weights with float activations")
    assert next(engine for engine in found if engine.name == "vLLM on a GPU").loads
    assert verdicts("a format of somebody else", 4, 32) == {}
