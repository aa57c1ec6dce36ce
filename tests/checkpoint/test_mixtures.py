"""Checkpoints of mixtures: what is read, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_lrqat import LRQATConfig, can_export, export, load_quantized
from peft_lrqat.checkpoint.inspect import inspect
from peft_lrqat.checkpoint.verify import verify
from peft_lrqat.grid import Grid
from tests.architectures import ARCHITECTURES
from tests.mixtures import EXPERTS, FIRST, mixture, of_family, on_experts
from tests.models import VOCAB, logits, tokens

IDS = tokens(1, 5)
SIZES = {"moe_intermediate_size": 32, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def merged() -> PreTrainedModel:
    return on_experts(mixture(torch.bfloat16, **SIZES), group_size=32).merge_and_unload()


@pytest.fixture(scope="module")
def folder(merged: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As others write one: the experts alone are quantized, symmetric, in groups of 32 (Kimi)."""
    where = tmp_path_factory.mktemp("mixture")
    model = on_experts(
        mixture(torch.bfloat16, **SIZES), group_size=32, target_modules=["gate_proj", "up_proj", "down_proj"]
    )
    model.merge_and_unload().save_pretrained(where)
    config = json.loads((where / "config.json").read_text())
    del config["peft_lrqat"]  # what only this package writes
    (where / "config.json").write_text(json.dumps(config))
    return where


@pytest.mark.parametrize("format", [pytest.param("compressed-tensors", marks=pytest.mark.slow), "gptq"])
def test_formats(merged: PreTrainedModel, tmp_path: Path, format: str):
    assert export(merged, tmp_path / "out", format, progress=False).loss is None
    if format == "gptq":  # no package would help: it is not said that some are missing
        found = verify(tmp_path / "out")
        assert (found.missing, found.engine, bool(found)) == ([], None, False)
        assert "transformers joins the experts" in found.skipped
        said = {engine.name: engine for engine in inspect(tmp_path / "out").engines}
        assert said["transformers + optimum + gptqmodel"].why == found.skipped
    files = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.startswith(f"{FIRST}.{EXPERTS - 1}.up_proj.") for name in files)
    loaded = load_quantized(tmp_path / "out").eval()
    assert torch.equal(logits(loaded, IDS), logits(merged, IDS))
    again = export(tmp_path / "out", tmp_path / "again", "compressed-tensors", progress=False)
    assert again.loss is None
    assert torch.equal(logits(load_quantized(tmp_path / "again").eval(), IDS), logits(merged, IDS))


def test_what_transformers_would_load_with_random_experts_is_not_written(merged: PreTrainedModel):
    found = can_export(merged, "torchao")
    assert not found
    assert "joins the experts" in str(found)


def test_a_checkpoint_whose_experts_alone_are_quantized(folder: Path):
    loaded = load_quantized(folder).eval()
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(loaded, IDS), logits(plain, IDS))
    model = get_peft_model(loaded, LRQATConfig(r=1, target_modules=["experts.gate_up_proj", "experts.down_proj"]))
    assert torch.equal(logits(model, IDS), logits(plain, IDS))
    layer: Any = model.base_model.model.get_submodule(f"{FIRST}.down_proj")
    assert layer.frozen.grid == Grid(4, 32)


def test_a_folder_is_verified(merged: PreTrainedModel, tmp_path: Path):
    """transformers has joined the experts, and each is looked at."""
    merged.save_pretrained(tmp_path)
    found = verify(tmp_path)
    assert [finding.what for finding in found.findings] == ["logits", "the engine's weights"]
    assert all(finding.equal for finding in found.findings)
    state = load_file(tmp_path / "model.safetensors")
    state[f"{FIRST}.3.up_proj.weight_packed"][0, 0] ^= 1
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    changed = {finding.what: finding for finding in verify(tmp_path, merged).findings}
    assert not changed["codes, scales, zero points"].equal
    total = 2 * (4 + 3 * EXPERTS)
    assert changed["the engine's weights"].detail.startswith(f"{total - 1} of {total} layers equal")


@pytest.mark.parametrize("of_folder", [True, False])
def test_logits_are_compared_where_the_router_has_a_loss(of_folder: bool, merged: PreTrainedModel, tmp_path: Path):
    """TRL sets `output_router_logits` on what it trains, and transformers returns that loss before the logits then."""
    merged.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["output_router_logits"] = True
    (tmp_path / "config.json").write_text(json.dumps(described))
    found = {finding.what: finding for finding in verify(tmp_path, None if of_folder else merged).findings}
    reach = logits(merged, torch.randint(0, VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))).abs().max()
    assert found["logits"].equal
    assert f"(logits reach {reach:.2f})" in found["logits"].detail


@pytest.mark.parametrize("name", ["Qwen 3 MoE", "Mixtral"])
def test_experts_of_some_layers_are_quantized(name: str, tmp_path: Path):
    """transformers cannot load that, which merging says; `load_quantized`, which it names, does."""
    config = ARCHITECTURES[name].config()
    config.num_hidden_layers = 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    adapted = on_experts(model, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "layers.0.mlp.experts"])
    expected = logits(adapted, IDS)
    with pytest.warns(UserWarning, match=r"experts of all layers.*load_quantized"):
        merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = load_quantized(tmp_path / "merged").eval()
    assert torch.equal(logits(loaded, IDS), expected)
    loaded.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / where / "model.safetensors") for where in ("merged", "again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    assert torch.equal(logits(get_peft_model(loaded, LRQATConfig(r=1)).eval(), IDS), expected)


def test_floats_that_transformers_made_of_integers_are_no_start(merged: PreTrainedModel, tmp_path: Path):
    merged.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"transformers has made floats of the experts.*load_quantized"):
        get_peft_model(model, LRQATConfig(r=1))


def test_experts_that_are_quantized_in_part(folder: Path, tmp_path: Path):
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if f"{FIRST}.1.up_proj." in name]:
        del state[name]
    state[f"{FIRST}.1.up_proj.weight"] = torch.zeros(32, 32, dtype=torch.bfloat16)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for read in (load_quantized, lambda where: can_export(where, "gptq")):
        with pytest.raises(ValueError, match=r"14 of 15 layers of the experts.*up_proj"):
            read(tmp_path)


def test_an_expert_that_is_missing(folder: Path, tmp_path: Path):
    state = load_file(folder / "model.safetensors")
    del state[f"{FIRST}.1.up_proj.weight_packed"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"experts.1.up_proj.*cannot be read|missing"):
        can_export(tmp_path, "gptq")
    with pytest.raises(ValueError, match="missing"):
        load_quantized(tmp_path)


#: What GPTQModel 7.7.0 wrote of an expert and of the rest of the first layer of `of_family("mixtral")`: 4 bits, groups
#: of 32.
_GPTQMODEL = {
    "mlp.experts.1.gate_proj": {"qweight": (8, 96), "qzeros": (2, 12), "scales": (2, 96), "g_idx": (64,)},
    "mlp.experts.1.up_proj": {"qweight": (8, 96), "qzeros": (2, 12), "scales": (2, 96), "g_idx": (64,)},
    "mlp.experts.1.down_proj": {"qweight": (12, 64), "qzeros": (3, 8), "scales": (3, 64), "g_idx": (96,)},
    "self_attn.q_proj": {"qweight": (8, 64), "qzeros": (2, 8), "scales": (2, 64), "g_idx": (64,)},
    "self_attn.k_proj": {"qweight": (8, 32), "qzeros": (2, 4), "scales": (2, 32), "g_idx": (64,)},
    "self_attn.v_proj": {"qweight": (8, 32), "qzeros": (2, 4), "scales": (2, 32), "g_idx": (64,)},
    "self_attn.o_proj": {"qweight": (8, 64), "qzeros": (2, 8), "scales": (2, 64), "g_idx": (64,)},
    "mlp.gate": {"weight": (5, 64)},
    "input_layernorm": {"weight": (64,)},
    "post_attention_layernorm": {"weight": (64,)},
}
#: Its `quantization_config`, without `meta`.
_GPTQMODEL_CONFIG = {
    "bits": 4, "checkpoint_format": "gptq", "desc_act": False, "format": "gptq", "group_size": 32, "lm_head": False,
    "method": "gptq", "pack_dtype": "int32", "quant_method": "gptq", "sym": True,
}  # fmt: skip


def test_a_mixtral_of_gptqmodel(tmp_path: Path):
    """Its tensors are called as in transformers' model, and the parts of its experts as in no Mixtral."""
    model = on_experts(of_family("mixtral", torch.float16, num_hidden_layers=1), group_size=32).merge_and_unload()
    export(model, tmp_path / "ours", "gptq", progress=False)
    expected = logits(load_quantized(tmp_path / "ours").eval(), IDS)
    called = {"block_sparse_moe": "mlp", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
    state = {}
    for name, tensor in load_file(tmp_path / "ours" / "model.safetensors").items():
        for ours, theirs in called.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    prefix, others = "model.layers.0.", [f"mlp.experts.{e}." for e in range(EXPERTS) if e != 1]
    first = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    first = {name: tuple(t.shape) for name, t in first.items() if not name.startswith(tuple(others))}
    assert first == {f"{module}.{part}": size for module, sizes in _GPTQMODEL.items() for part, size in sizes.items()}

    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    del config["peft_lrqat"]
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": _GPTQMODEL_CONFIG}))
    loaded = load_quantized(folder).eval()
    assert torch.equal(logits(loaded, IDS), expected)
    names = load_file(tmp_path / "ours" / "model.safetensors").keys()
    for number, source in enumerate((folder, loaded)):  # both write what other programs call it
        report = export(source, tmp_path / str(number), "gptq", progress=False)
        assert load_file(report.folder / "model.safetensors").keys() == names
        assert torch.equal(logits(load_quantized(report.folder).eval(), IDS), expected)
    assert {engine.name: engine.loads for engine in inspect(folder).engines}["gptqmodel"]
    assert not {engine.name: engine.loads for engine in inspect(tmp_path / "ours").engines}["gptqmodel"]
    adapted = get_peft_model(loaded, LRQATConfig(r=1, target_modules=["experts"])).eval()
    assert torch.equal(logits(adapted, IDS), expected)
