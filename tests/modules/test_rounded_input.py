"""Merged layers that round their input: what was trained, also under autocast, and beside other layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_lrqat import LRQATConfig, can_export, load_quantized
from peft_lrqat.checkpoint.inspect import inspect
from peft_lrqat.checkpoint.verify import verify
from peft_lrqat.grid import Grid
from peft_lrqat.modules.packed import QuantizedLinear, merged_layer
from peft_lrqat.modules.rounded_input import BitNetLinear, Int8Linear
from peft_lrqat.ops.activations import Activations
from tests.grids import random_tensor
from tests.models import adapted, logits, low_bit, reload_clean, tiny, tokens, train
from tests.quantized_files import Spec, write


def repr_of(value) -> str:
    return getattr(value, "__name__", None) or str(value)


INT8 = Activations("compressed-tensors")
HUMMING8, HUMMING4 = Activations("humming"), Activations("humming", 4)
BITNET = {"bits": 1.58, "group_size": 0, "act_bits": 8}


KINDS = [
    (low_bit, "llama", BITNET),
    (low_bit, "llama", {**BITNET, "learn_scales": True}),
    (low_bit, "llama", {**BITNET, "bits": 8, "forward_bits": 1.58}),
    (low_bit, "qwen2", {**BITNET, "export_format": "compressed-tensors"}),
    (low_bit, "qwen2", {"bits": 4, "act_bits": 8}),
    (low_bit, "qwen2", {"bits": 4, "group_size": 8}),
    (adapted, "qwen2", {"bits": 4, "act_bits": 8}),
    (adapted, "qwen2", {"bits": 3, "group_size": 8, "symmetric": False}),
]
CASES = [
    *((*kind, torch.float32, torch.bfloat16) for kind in KINDS),
    *((*kind, torch.bfloat16, torch.float16) for kind in KINDS),
    (adapted, "gpt2", {"bits": 4, "group_size": 8}, torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize(("make", "family", "options", "dtype", "cast"), CASES, ids=repr_of)
def test_trained_merged_and_unmerged_are_equal_under_autocast(make, family, options, dtype, cast):
    model = make(tiny(family, dtype=dtype, num_hidden_layers=1), **options)
    train(model, tokens(), lr=2e-2)
    with torch.autocast("cpu", cast), torch.no_grad():
        trained = logits(model, tokens())
        model.merge_adapter()
        assert torch.equal(logits(model, tokens()), trained)
        model.unmerge_adapter()
        assert torch.equal(logits(model, tokens()), trained)
        assert torch.equal(logits(model.merge_and_unload(), tokens()), trained)


def test_layers_of_both_kinds_in_one_checkpoint_are_described_as_they_are(tmp_path: Path):
    """8-bit activations in some layers of a base that was quantized already; the others keep theirs."""
    write(tmp_path / "base", Spec("packed", 8, -1, dtype=torch.float32))
    options = {"r": 4, "target_modules": ["up_proj", "down_proj"], "act_bits": 8, "task_type": "CAUSAL_LM"}
    model = get_peft_model(load_quantized(tmp_path / "base"), LRQATConfig(**options))
    train(model, tokens())
    trained = logits(model, tokens())
    merged = model.merge_and_unload()
    kinds = {name: type(module) for name, module in merged.named_modules() if isinstance(module, nn.Linear)}
    assert kinds["model.layers.0.mlp.up_proj"] is Int8Linear
    assert kinds["model.layers.0.mlp.gate_proj"] is QuantizedLinear
    assert torch.equal(logits(merged, tokens()), trained)
    merged.save_pretrained(tmp_path / "out")
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(group["format"] for group in groups.values()) == ["int-quantized", "pack-quantized"]
    assert torch.equal(logits(load_quantized(tmp_path / "out"), tokens()), trained)
    (again,) = reload_clean([tmp_path / "out"], tokens(), tmp_path)
    assert torch.equal(again, trained)


def test_the_factory_refuses_what_a_layer_cannot_hold():
    weight = random_tensor(Grid(1.58, 0), 32, 64)
    assert isinstance(merged_layer(weight, None, 2, torch.bfloat16, activations=Activations("bitnet")), BitNetLinear)
    with pytest.raises(ValueError, match="bias cannot be stored in BitNet"):
        merged_layer(weight, nn.Parameter(torch.zeros(32)), 2, torch.bfloat16, activations=Activations("bitnet"))
    fine = random_tensor(Grid(8, -1), 32, 64, scale_dtype="fp16")
    with pytest.raises(ValueError, match=r"float16 numbers that torch\.bfloat16 does not hold"):
        merged_layer(fine, None, 8, torch.bfloat16, activations=INT8, file_scale_dtype=torch.float16)


@pytest.mark.parametrize("make", [adapted, low_bit])
def test_packed_weights_with_rounded_inputs_go_on_as_they_are(make, tmp_path: Path):
    """Trained by vLLM's rule, merged, saved, loaded: the same numbers, and training goes on only with the same."""
    options = {"bits": 4, "act_bits": 4, "act_rule": "vllm", "act_bits_pattern": {"v_proj": None, "(q|v)_proj": 8}}
    model = make(tiny(dtype=torch.bfloat16, num_hidden_layers=1), **options)
    train(model, tokens(), lr=2e-2)
    trained = logits(model, tokens())
    model.save_pretrained(tmp_path / "adapter")
    config = type(model.peft_config["default"]).from_pretrained(tmp_path / "adapter")
    assert list(config.act_bits_pattern) == list(options["act_bits_pattern"])  # the first that matches counts
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "out")
    loaded = load_quantized(tmp_path / "out")
    attention = loaded.model.layers[0].self_attn
    assert [attention.get_submodule(f"{n}_proj").activations for n in "qkv"] == [HUMMING8, HUMMING4, None]
    for one in (merged, loaded):
        assert torch.equal(logits(one, tokens()), trained)
    assert any("rounds activations otherwise" in engine.why for engine in inspect(tmp_path / "out").engines)
    assert "'vllm'" in str(can_export(tmp_path / "out", "compressed-tensors", container_bits=8))
    assert bool(can_export(tmp_path / "out", "compressed-tensors"))
    there = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens())  # by its own rule
    assert not torch.equal(there, trained)
    torch.testing.assert_close(there, trained, rtol=0, atol=0.5 * float(trained.abs().max()))
    found = verify(tmp_path / "out")
    assert "rounds activations" in found.skipped

    with pytest.raises(ValueError, match=r"rounds its input \(8 bits, 127 steps.*`act_bits=8`"):
        make(load_quantized(tmp_path / "out"), bits=4, range_method="lp")
    again = make(loaded, **options)
    assert torch.equal(logits(again, tokens()), trained)
    with again.disable_adapter():
        assert torch.equal(logits(again, tokens()), trained)
    assert torch.equal(logits(again.unload(), tokens()), trained)
