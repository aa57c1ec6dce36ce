"""Scales whose sign chooses the side on which the grid has one level more: on every road what positive ones are."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from peft_lrqat import LowBitSRConfig, LRQATConfig, can_export, export, load_quantized
from peft_lrqat.formats.gguf.blocks import BLOCK_TYPES
from peft_lrqat.formats.gguf.choice import from_blocks
from peft_lrqat.formats.gguf.reader import GGUFFile
from peft_lrqat.formats.gguf.tensors import in_file_order, places
from peft_lrqat.grid import Grid, GridTensor
from tests.grids import SIZES, random_tensor
from tests.models import adapted, logits, tiny, train


def test_a_trained_model_is_the_merged_and_the_reloaded_one(method: ModuleType, tmp_path: Path):
    base = tiny(dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    model = method.adapt(base, **method.GRID, learn_scales=True)
    start = {name: layer.frozen.scale0.clone() for name, layer in method.layers(model).items()}
    train(model, method.IDS)
    for name, layer in method.layers(model).items():
        scale = layer.grid_tensor().scale
        assert not torch.equal(scale, start[name])
        assert torch.equal(scale.sign(), start[name].sign())
        assert 0.1 < (scale < 0).float().mean() < 0.9
    expected = logits(model, method.IDS)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, method.IDS), expected)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_quantized(tmp_path / "merged"), method.IDS), expected)
    again = PeftModel.from_pretrained(tiny(dtype=torch.bfloat16), tmp_path / "adapter")
    assert torch.equal(logits(again, method.IDS), expected)


def test_an_adapter_of_before_has_positive_scales(method: ModuleType, tmp_path: Path):
    model = method.random_adapter(tiny(), signed_scales=False)
    assert all((layer.frozen.scale0 > 0).all() for layer in method.layers(model).values())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    said = json.loads(path.read_text())
    assert said.pop("signed_scales") is False
    path.write_text(json.dumps(said))
    again = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(logits(again, method.IDS), logits(model, method.IDS))
    assert PeftConfig.from_pretrained(tmp_path).signed_scales is False
    assert method.config().signed_scales is True


def test_a_trainer_checkpoint_of_before_is_resumed_with_positive_scales(method: ModuleType, tmp_path: Path):
    before = method.random_adapter(tiny(), signed_scales=False)
    before.save_pretrained(tmp_path)  # all that a Trainer reads of it is the tensors
    saved = load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"`signed_scales=True`, which is the default.* set `signed_scales=False`"):
        set_peft_model_state_dict(method.random_adapter(tiny()), saved)
    again = method.random_adapter(tiny(), signed_scales=False)
    set_peft_model_state_dict(again, saved)
    assert torch.equal(logits(again, method.IDS), logits(before, method.IDS))
    other = method.random_adapter(tiny(seed=1), signed_scales=False)
    with pytest.raises(ValueError, match="trained on another base") as error:
        set_peft_model_state_dict(other, saved)
    assert "signed_scales" not in str(error.value)


def test_without_a_side_there_is_no_sign():
    assert LRQATConfig(symmetric=False).signed_scales is False
    assert LowBitSRConfig(bits=1.58).signed_scales is False
    assert LowBitSRConfig(bits=4, range_method="absmean").signed_scales is False
    assert LowBitSRConfig(bits=4).signed_scales is True


def test_a_scale_that_training_moves_through_zero_is_lost_on_either_side(method: ModuleType):
    model = method.adapt(tiny(), **method.GRID, learn_scales=True)
    layer = next(iter(method.layers(model).values()))
    shifts = layer.lora_scale_shift if method.NAME == "LR-QAT" else layer.lowbitsr_scale_shift
    with torch.no_grad():
        shifts["default"].weight.fill_(-1.5)
    with pytest.raises(ValueError, match=f"{layer.frozen.scale0.numel()} scales of"):
        layer.grid_tensor()


@pytest.mark.filterwarnings("ignore:`scale_dtype` is 'fp16', but the model is torch.bfloat16")
def test_a_model_in_bf16_on_the_lattice_of_q4_0_is_trained_and_exported_on_it(
    method: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """As Google's Gemma "qat-q4_0-unquantized": d is an fp16 number of either sign, the weights are d q in bf16."""
    model = tiny(dtype=torch.bfloat16, **SIZES)
    weights = {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            linear.weight.data = random_tensor(Grid(4, 32), *linear.weight.shape, "fp16").dequantize(torch.bfloat16)
            weights[name] = linear.weight.data.clone()
    expected = logits(model, method.IDS)
    options = {"bits": 4, "group_size": 32, "range_method": "lp", "signed_scales": True, "scale_dtype": "fp16"}
    caplog.set_level(logging.INFO, "peft_lrqat")
    adapted = method.adapt(model, **options)
    assert "100 % of the groups lay on the grid already." in caplog.text
    assert torch.equal(logits(adapted, method.IDS), expected)
    assert not can_export(adapted, "compressed-tensors")
    with pytest.raises(ValueError, match="cannot hold the scales"):
        copy.deepcopy(adapted).merge_and_unload()
    export(adapted, tmp_path, "gguf", vocabulary=False, progress=False)
    file = GGUFFile(next(tmp_path.glob("*.gguf")))
    for name, weight in weights.items():
        key = places(model.config)(name + ".weight").tensor
        assert file.tensors[key].type == "q4_0"
        levels, d = from_blocks(file.read(key), BLOCK_TYPES["q4_0"])
        tensor = GridTensor(levels.to(torch.int8), d, None, Grid(4, 32))
        stored = in_file_order(GridTensor(weight, d, None, Grid(4, 32)), model.config, name).codes
        assert torch.equal(tensor.dequantize(torch.bfloat16), stored)
    train(adapted, method.IDS)
    trained = logits(adapted, method.IDS)
    assert not torch.equal(trained, expected)
    export(adapted, tmp_path, "gguf", vocabulary=False, progress=False, overwrite=True)
    assert torch.equal(logits(adapted, method.IDS), trained)


def test_training_goes_on_from_negative_scales(tmp_path: Path):
    """The checkpoint of a trained model, as any foreign one with such scales."""
    merged = adapted(tiny(), bits=4, group_size=8, signed_scales=True).merge_and_unload()
    merged.save_pretrained(tmp_path)
    base = load_quantized(tmp_path)
    ids = torch.arange(8).view(1, 8)
    before = logits(base, ids)
    model = get_peft_model(base, LRQATConfig(r=4))
    assert model.peft_config["default"].scale_dtype == "auto"
    assert model.peft_config["default"].signed_scales is True
    assert torch.equal(logits(model, ids), before)
    assert any((layer.scale0 < 0).any() for layer in model.modules() if hasattr(layer, "scale0"))
    train(model, ids)
    after = logits(model, ids)
    assert torch.equal(logits(model.merge_and_unload(), ids), after)
