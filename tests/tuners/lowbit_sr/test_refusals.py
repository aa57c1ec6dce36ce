"""Bad input: an error that says what to do, before anything is changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from tests.lowbit_sr import config
from tests.models import logits, low_bit, tiny, tokens
from tests.refusals import refused

IDS = tokens()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 1}, r"`bits` is 1; allowed are 1.58, 2, 3, 4, 8 \(1.58 is ternary\)"),
        ({"bits": 5}, "`bits` is 5"),
        ({"range_method": "mse"}, "`range_method` is 'mse'; allowed are 'absmean', 'minmax', 'lp'"),
        ({"error_feedback": 1.5}, "`error_feedback` is 1.5"),
        ({"keep_base": None}, "`keep_base` is None"),
        ({"seed": 0.5}, "`seed` is 0.5"),
        ({"bias": "lora_only"}, "`bias` is 'lora_only'; allowed are 'none', 'all', 'lowbitsr_only'"),
        ({"forward_bits": 2}, "`forward_bits` is 2; allowed are None, 1.58"),
        (
            {"bits": 4, "grow_scales": True},
            "`grow_scales` is True, but `bits` is 4.*`headroom`",
        ),
        ({"forward_bits": 1.58, "bits": 2}, "nothing to project. Train at least 3 bits"),
        ({"bits": 8, "container_bits": 4}, "`container_bits` is 4.*take 8 bits"),
        ({"bits": 8, "forward_bits": 1.58, "container_bits": 1}, "`container_bits` is 1.*ternary.*take 2 bits"),
        ({"bits": 1.58, "signed_scales": True}, "`signed_scales` is True.*the ternary grid has as many on both"),
        ({"range_method": "absmean", "signed_scales": True}, "`signed_scales` is True.*absmean looks at no side"),
        ({"export_format": "gguf"}, "`export_format` is 'gguf'; allowed are 'compressed-tensors', 'bitnet'"),
        ({"export_format": "bitnet"}, r"holds ternary weights.*`group_size=0`, `act_bits=8`"),
        (
            {"bits": 1.58, "group_size": 0, "act_bits": 8, "export_format": "bitnet", "act_rule": "vllm"},
            r"`act_bits=8` without `act_group_size`.*Use 'compressed-tensors'",
        ),
        (
            {"bits": 1.58, "group_size": 0, "act_bits": 8, "export_format": "bitnet", "container_bits": 8},
            "BitNet's format stores 2 bits a code",
        ),
    ],
)
def test_options_out_of_range(options: dict, match: str):
    with refused(tiny(), match):
        config(**options)


def test_an_option_of_lora_is_no_option():
    with pytest.raises(TypeError, match="lora_alpha"):
        config(lora_alpha=8)


def test_embeddings_cannot_be_converted():
    with refused(model := tiny(), "Low-bit SR quantizes nn.Linear and Conv1D only"):
        get_peft_model(model, config(target_modules=["embed_tokens"]))


@pytest.mark.parametrize(
    ("family", "overrides", "options", "match"),
    [
        ("qwen2", {}, {"bits": 1.58}, "`export_format='bitnet'` cannot hold module.*q_proj.*a bias"),
        ("llama", {"intermediate_size": 50}, {"bits": 1.58}, "cannot hold module.*gate_proj.*50 output features"),
        ("gpt2", {}, {"bits": 4}, "`act_bits` is 8, but module.*is a Conv1D"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_training(family, overrides, options: dict, match: str):
    model = tiny(family, **overrides)
    targets = ["c_attn"] if family == "gpt2" else "all-linear"
    with refused(model, match):
        get_peft_model(model, config(group_size=0, act_bits=8, target_modules=targets, **options))


def test_a_merged_model_that_rounds_its_inputs_is_not_converted_again():
    for options in ({"bits": 8, "act_bits": 8}, {"bits": 1.58, "group_size": 0, "act_bits": 8}):
        merged = low_bit(tiny(), **options).merge_and_unload()
        with refused(merged, r"q_proj' \(.*Linear\) has no float weight \(it seems to be quantized\).*Load the float"):
            get_peft_model(merged, config())


@pytest.mark.parametrize("option", [{"range_method": "absmean"}, {"keep_base": False}])
def test_adapters_of_one_model_share_a_grid(option: dict):
    model = low_bit(tiny(), bits=4, group_size=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{next(iter(option))}="):
        model.add_adapter("other", config(**option))
    assert list(model.peft_config) == ["default"]
    assert model.state_dict().keys() == before.keys()


# -- adapter files


@pytest.mark.parametrize("change", [{"bits": 3}, {"group_size": 16}])
def test_another_grid_than_the_file_has(folder: Path, change: dict):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with refused(model := tiny(), "has shape.*group size"):
        PeftModel.from_pretrained(model, folder)


def test_another_grid_in_an_existing_adapter(folder: Path):
    # the Trainer's way of resuming: the adapter exists, and only values are loaded
    model = low_bit(tiny(), bits=4, group_size=16).eval()
    before = logits(model, IDS)
    with pytest.raises((ValueError, RuntimeError), match="made for another grid"):
        model.load_adapter(folder, adapter_name="default")
    assert torch.equal(logits(model, IDS), before)


def test_two_bit_codes_in_a_ternary_adapter(tmp_path: Path):
    low_bit(tiny(), bits=2, range_method="absmean", init_weights=False).save_pretrained(tmp_path)
    model = low_bit(tiny(), bits=1.58).eval()  # the same shapes
    before = logits(model, IDS)
    with pytest.raises(ValueError, match=r"two-bit codes.*grid is ternary"):
        model.load_adapter(tmp_path, adapter_name="default")
    assert torch.equal(logits(model, IDS), before)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bits": 1.58, "base_fingerprint": None}))
    with refused(model := tiny(), r"two-bit codes.*grid is ternary"):
        PeftModel.from_pretrained(model, tmp_path)
