"""Whole files: every architecture in llama.cpp, and in transformers' own GGUF loader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_lrqat import can_export, export
from peft_lrqat.checkpoint.open import open_source
from peft_lrqat.checkpoint.verify_gguf import differences
from peft_lrqat.formats.gguf.reader import GGUFFile
from peft_lrqat.grid import TERNARY
from tests.ggml import Llama, dequantize
from tests.models import adapted, logits, low_bit, tiny

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 128}
GEMMA = {"tie": True, "query_pre_attn_scalar": 32, "sliding_window": 8}
LLAMA_31 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA_3_LONG = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
}
MODELS = {
    "llama": ("llama", {"head_dim": 16}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie": True}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA_31}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"head_dim": None}),
    "qwen2, yarn": ("qwen2", {"head_dim": None, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {"tie": True}),
    "gemma 2": ("gemma2", GEMMA),
    "gemma 3": ("gemma3", {**GEMMA, "num_hidden_layers": 7}),
    "gemma 3, long": ("gemma3", {**GEMMA, "num_hidden_layers": 7, "rope_parameters": GEMMA_3_LONG}),
}
IDS = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(1))


def made(name: str, **overrides) -> torch.nn.Module:
    """A random model whose one-dimensional tensors are random too."""
    family, settings = MODELS[name]
    settings = {k: v for k, v in {**SIZES, **settings, **overrides}.items() if v is not None}
    model = tiny(family, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def quantized(model: torch.nn.Module, **config) -> torch.nn.Module:
    """`model` with LR-QAT adapters that move many of its integers."""
    return adapted(model, **{"bits": 4, "range_method": "minmax", "init_lora_weights": False, **config})


def written(model: torch.nn.Module, folder: Path, **options) -> Path:
    export(model, folder, format="gguf", vocabulary=False, progress=False, **options)
    return next(folder.glob("*.gguf"))


def in_llama_cpp(path: Path) -> torch.Tensor:
    with Llama(path) as llama:
        return llama.logits(IDS[0].tolist())


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does(name, tmp_path):
    """With float weights nothing is rounded: every hyperparameter, name and row order must be right."""
    merged = quantized(made(name), group_size=32).merge_and_unload()
    wanted = logits(merged, IDS)[0]
    found = in_llama_cpp(written(merged, tmp_path / "out", type="f32"))
    # ggml looks GELU up in a table of fp16 numbers
    assert (found - wanted).abs().max() < (5e-3 if "gemma" in name else 1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gemma"])  # which its GGUF loader does not know
def test_transformers_reads_the_same_weights(name, tmp_path):
    merged = quantized(made(name), group_size=32).merge_and_unload()
    path = written(merged, tmp_path / "out")
    config = None if name == "mistral" else open_source(merged).config
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=torch.float32)
    for layer in open_source(merged).grids():
        assert torch.equal(read.get_submodule(layer).weight, merged.get_submodule(layer).weight), layer
    others = merged.state_dict()
    for key, value in read.state_dict().items():
        if key in others:  # the reader takes Gemma's 1 off the norms again, and rounds
            torch.testing.assert_close(value, others[key], rtol=0, atol=2e-7 if "norm" in key else 0)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "options", "type"),
    [
        (TERNARY, 0, True, {}, "tq1_0"),
        (TERNARY, -1, True, {"type": "tq2_0"}, "tq2_0"),
        (2, -1, True, {}, "tq2_0"),
        (2, 64, True, {}, "q2_0"),
        (2, -1, False, {"type": "q2_k"}, "q2_k"),
        (3, -1, True, {}, "q3_k"),
        (3, 32, True, {}, "q4_0"),
        (4, 64, True, {}, "q4_0"),
        (4, -1, True, {"type": "q4_k"}, "q4_k"),
        (4, 32, False, {}, "q5_0"),
        (4, -1, False, {}, "q4_k"),
        (4, 32, True, {"type": "q4_1"}, "q4_1"),
        (5, 32, True, {}, "q5_0"),
        (5, 32, True, {"type": "q5_1"}, "q5_1"),
        (5, -1, False, {}, "q5_k"),
        (6, -1, True, {}, "q6_k"),
        (8, 32, True, {}, "q8_0"),
    ],
)
def test_each_type_runs_in_llama_cpp_with_the_trained_weights(bits, group_size, symmetric, options, type, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    config = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    model = made("llama", **sizes)
    model = low_bit(model, bits=bits, group_size=group_size) if bits == TERNARY else quantized(model, **config)
    path = written(model, tmp_path / "out", **options)
    source = open_source(model)
    file = GGUFFile(path)
    stored = file.tensors["blk.0.ffn_down.weight"]
    assert stored.type == type
    weight = source.layer("model.layers.0.mlp.down_proj").dequantize(torch.float32)
    assert torch.equal(dequantize(file.read("blk.0.ffn_down.weight"), type, 256), weight)
    assert differences(GGUFFile(path), source) == {}
    merged = model.merge_and_unload()
    for name, info in open_source(merged).grids().items():  # float32, to have no other rounding than llama.cpp's
        dense = torch.nn.Linear(info.in_features, info.out_features, bias=False)
        dense.weight.data = open_source(merged).layer(name).dequantize(torch.float32)
        merged.set_submodule(name, dense)
    wanted = logits(merged, IDS)[0]
    # llama.cpp rounds activations to 8 bits, for K types and TQ2_0 with one scale for 256 of them
    assert (in_llama_cpp(path) - wanted).norm() < 0.1 * wanted.norm()


def test_embeddings_keep_their_dtype_unless_told(tmp_path):
    model = quantized(made("llama").bfloat16(), group_size=32).merge_and_unload()
    types = {}
    for choice in ("auto", "f32", "f16", "q8_0"):
        path = written(model, tmp_path / choice, embedding_type=choice)
        types[choice] = {GGUFFile(path).tensors[n].type for n in ("token_embd.weight", "output.weight")}
        assert torch.isfinite(in_llama_cpp(path)).all()
    assert types == {"auto": {"bf16"}, "f32": {"f32"}, "f16": {"f16"}, "q8_0": {"q8_0"}}


def test_the_loss_of_rounded_embeddings_is_reported(tmp_path):
    model = quantized(made("llama"), group_size=32)
    report = export(model, tmp_path / "out", format="gguf", vocabulary=False, embedding_type="q8_0", progress=False)
    assert [note for note in report.notes if "embed_tokens" in note and "Q8_0" in note and "error" in note]
    assert report.loss is None  # nothing that was trained on a grid changed


def test_bits_per_weight_count_scales(tmp_path):
    model = quantized(made("llama"), group_size=32)
    report = export(model, tmp_path / "out", format="gguf", vocabulary=False, progress=False)
    assert report.bits_per_weight == 4.5
    assert report.total_bytes >= next((tmp_path / "out").glob("*.gguf")).stat().st_size


@pytest.mark.parametrize(("bits", "symmetric", "smaller"), [(3, True, "Q3_K"), (2, False, "Q2_K"), (4, True, None)])
def test_the_report_says_why_a_narrow_grid_takes_a_wide_type(bits, symmetric, smaller, tmp_path):
    model = quantized(made("llama"), bits=bits, symmetric=symmetric, group_size=32)
    report = export(model, tmp_path / "out", format="gguf", vocabulary=False, progress=False)
    said = [note for note in report.notes if "bits a weight as Q4_0" in note]
    if smaller is None:
        assert not said
    else:
        assert f"{smaller} would take" in said[0]
        assert "do not divide into" in said[0]


def test_an_embedding_trained_on_a_grid_is_stored_on_it(tmp_path):
    targets = ["embed_tokens", "q_proj", "down_proj"]
    model = quantized(made("llama"), group_size=32, target_modules=targets)
    path = written(model, tmp_path / "out")
    assert GGUFFile(path).tensors["token_embd.weight"].type == "q4_0"
    assert differences(GGUFFile(path), open_source(model)) == {}
    wanted = logits(model.merge_and_unload(), IDS)[0]
    assert (in_llama_cpp(path) - wanted).norm() < 0.03 * wanted.norm()


def test_a_file_of_another_model_is_told_apart(tmp_path):
    model = quantized(made("llama"), group_size=32)
    path = written(model, tmp_path / "out")
    other = open_source(quantized(made("llama"), group_size=32))
    assert set(differences(GGUFFile(path), other)) == set(other.grids())


@pytest.mark.parametrize(
    ("config", "options", "reason", "suggestion"),
    [
        ({"bits": 4, "group_size": 48}, {}, "groups of 48 do not divide", "group_size 32 or -1"),
        ({"bits": 8, "symmetric": False}, {}, "no GGUF type holds every level", "symmetric"),
        ({"bits": 4, "scale_dtype": "fp32"}, {}, "not exact in fp16", "scale_dtype"),
        (
            {"bits": 2},
            {"type": "q2_k"},
            "96 input features do not divide into Q2_K blocks of 256",
            "Q4_0 holds it in 4.5",
        ),
        ({"bits": 8}, {"type": "q4_0"}, "Q4_0 holds 16 levels", "Q8_0 holds it in 8.5"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_before_any_work(config, options, reason, suggestion, tmp_path):
    model = quantized(made("llama", hidden_size=96, head_dim=24), **config)
    check = can_export(model, "gguf", **options)
    assert not check
    assert reason in str(check)
    assert suggestion in str(check)
    with pytest.raises(ValueError, match="not possible"):
        export(model, tmp_path / "out", format="gguf", vocabulary=False, **options)
    assert not any(tmp_path.iterdir())


def test_scales_are_rounded_only_if_allowed_and_the_loss_is_measured(tmp_path):
    model = quantized(made("llama"), group_size=32, scale_dtype="fp32")
    report = export(model, tmp_path / "out", format="gguf", vocabulary=False, allow_inexact=True, progress=False)
    assert 1e-5 < report.loss.relative < 2**-11
    assert differences(GGUFFile(next((tmp_path / "out").glob("*.gguf"))), open_source(model))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny("opt"), "supported are deepseek_v3, gemma"),
        (lambda: tiny("gemma2", query_pre_attn_scalar=5), "query_pre_attn_scalar"),
        (lambda: tiny("llama", hidden_act="relu"), "relu"),
        (lambda: tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(model, message):
    check = can_export(quantized(model()), "gguf")
    assert not check
    assert message in str(check)


def test_a_tokenizer_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="tokenizer="):
        export(quantized(made("llama"), group_size=32), tmp_path / "out", format="gguf", progress=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("option", "value"), [("type", "q9"), ("embedding_type", "q4_0")])
def test_unknown_types_are_refused_with_those_that_exist(option, value):
    with pytest.raises(ValueError, match=f"{option}.*{value}.*q8_0"):
        can_export(quantized(made("llama")), "gguf", **{option: value})


def test_the_sliding_window_that_llama_cpp_leaves_out_is_noted(tmp_path):
    model = quantized(made("mistral", sliding_window=64), group_size=32)
    report = export(model, tmp_path / "out", format="gguf", vocabulary=False, progress=False)
    assert any("sliding window of 64" in note for note in report.notes)
