"""Mixtures of experts as GGUF: what llama.cpp and transformers make of the files, and what is refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from peft_lrqat import can_export, export
from peft_lrqat.checkpoint.inspect import inspect
from peft_lrqat.checkpoint.open import open_source
from peft_lrqat.checkpoint.verify import verify
from peft_lrqat.checkpoint.verify_gguf import differences, float_differences
from peft_lrqat.formats.gguf.architectures import experts
from peft_lrqat.formats.gguf.reader import GGUFFile
from tests.ggml import Llama, dequantize
from tests.mixtures import EXPERTS, FAMILIES, of_family, on_experts
from tests.models import logits, low_bit

IDS = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(1))
WITHIN_TRANSFORMERS = ("qwen2_moe", "qwen3_moe")


def written(model: nn.Module | Path, folder: Path, **options) -> Path:
    export(model, folder, format="gguf", vocabulary=False, progress=False, **options)
    return next(folder.glob("*.gguf"))


def in_llama_cpp(path: Path) -> torch.Tensor:
    with Llama(path) as llama:
        return llama.logits(IDS[0].tolist())


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether logits differ as by activations of 8 bits, with which a few tokens go to other experts."""
    return bool(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).median() < 0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_does(family: str, tmp_path: Path):
    """With float weights nothing is rounded: each name, hyperparameter and order of experts must be right."""
    merged = on_experts(of_family(family), group_size=32).merge_and_unload()
    wanted = logits(merged, IDS)[0]
    assert (in_llama_cpp(written(merged, tmp_path / "floats", type="f32")) - wanted).abs().max() < 1e-5
    path = written(merged, tmp_path / "blocks")
    assert near(in_llama_cpp(path), wanted)
    file, source = GGUFFile(path), open_source(merged)
    assert file.tensors["blk.1.ffn_up_exps.weight"].type == "q4_0"
    assert file.tensors["blk.1.ffn_up_exps.weight"].shape[0] == experts(source.config)
    assert file.tensors["blk.1.ffn_gate_inp.weight"].type == "f32"
    name = "up_proj" if family != "mixtral" else "w3"
    layer = next(layer for layer in source.grids() if "layers.1." in layer and layer.endswith(f".experts.3.{name}"))
    weight = source.layer(layer).dequantize(torch.float32)
    assert torch.equal(dequantize(file.read("blk.1.ffn_up_exps.weight", 3), "q4_0", 64), weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_read_back(family: str, tmp_path: Path):
    model = on_experts(of_family(family), group_size=32)
    report = export(model, tmp_path / "out", format="gguf", vocabulary=False, progress=False)
    found = verify(tmp_path / "out", model)
    assert found
    assert bool(found.engine) == (family in WITHIN_TRANSFORMERS)
    assert len(found.findings) == (3 if family in WITHIN_TRANSFORMERS else 2)
    seen = inspect(tmp_path / "out")
    assert seen.weights == report.weights
    assert seen.layers == report.layers
    assert [engine.loads for engine in seen.engines] == [True, family in WITHIN_TRANSFORMERS]


@pytest.mark.parametrize("family", WITHIN_TRANSFORMERS)
def test_transformers_computes_the_same(family: str, tmp_path: Path):
    merged = on_experts(of_family(family), group_size=32).merge_and_unload()
    path, config = written(merged, tmp_path / "out"), open_source(merged).config
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=torch.float32)
    torch.testing.assert_close(logits(read.eval(), IDS), logits(merged, IDS), rtol=0, atol=1e-5)


def test_another_expert_is_told_apart(tmp_path: Path):
    merged = on_experts(of_family("qwen3_moe"), group_size=32).merge_and_unload()
    file = GGUFFile(written(merged, tmp_path / "out"))
    other = copy.deepcopy(merged)
    other.get_submodule("model.layers.1.mlp.experts.3.down_proj").weight_scale[0] *= 2
    assert list(differences(file, open_source(other))) == ["model.layers.1.mlp.experts.3.down_proj"]


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_stay_float(family: str, tmp_path: Path):
    model = low_bit(of_family(family, torch.bfloat16), bits=4, group_size=32)
    path = written(model, tmp_path / "out")
    file, source = GGUFFile(path), open_source(model)
    assert file.tensors["blk.1.ffn_gate_exps.weight"].type == "bf16"
    assert file.tensors["blk.1.ffn_gate_inp.weight"].type == "f32"
    assert file.tensors["blk.0.attn_output.weight"].type == "q4_0"
    assert float_differences(file, source) == {}
    wanted = logits(model.merge_and_unload().float(), IDS)[0]
    assert near(in_llama_cpp(path), wanted)


def test_a_folder_is_written_as_its_model_is(tmp_path: Path):
    merged = on_experts(of_family("mixtral", torch.bfloat16), group_size=32).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    first, second = written(merged, tmp_path / "a"), written(tmp_path / "merged", tmp_path / "b")
    one, other = GGUFFile(first), GGUFFile(second)
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.tensors)


@pytest.mark.parametrize(
    ("bits", "symmetric", "type"), [(2, True, "tq2_0"), (3, True, "q3_k"), (4, False, "q4_k"), (6, True, "q6_k")]
)
def test_blocks_of_256_hold_experts_per_channel(bits: int, symmetric: bool, type: str, tmp_path: Path):
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    model = on_experts(of_family("qwen3_moe", **sizes), bits=bits, symmetric=symmetric, group_size=-1)
    path = written(model, tmp_path / "out")
    file, source = GGUFFile(path), open_source(model)
    assert {t.type for name, t in file.tensors.items() if "_exps" in name} == {type}
    for e in range(EXPERTS):
        weight = source.layer(f"model.layers.0.mlp.experts.{e}.down_proj").dequantize(torch.float32)
        assert torch.equal(dequantize(file.read("blk.0.ffn_down_exps.weight", e), type, 256), weight)
    assert torch.isfinite(in_llama_cpp(path)).all()


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "`norm_topk_prob` is False; llama.cpp takes True in qwen3moe"),
        ("qwen2_moe", {"norm_topk_prob": True}, "`norm_topk_prob` is True; llama.cpp takes False in qwen2moe"),
        ("olmoe", {"norm_topk_prob": True}, "`norm_topk_prob`"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"`mlp_only_layers` is \[0\]; every layer has experts"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "`decoder_sparse_step` is 2"),
        ("olmoe", {"clip_qkv": 8.0}, "`clip_qkv` is 8.0"),
        ("olmoe", {"num_key_value_heads": 2}, "`num_key_value_heads` is 2"),
        ("qwen3_moe", {"attention_bias": True}, "`attention_bias`"),
        ("qwen2_moe", {"tie_word_embeddings": True}, "`tie_word_embeddings`"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family: str, settings: dict, message: str):
    check = can_export(on_experts(of_family(family, **settings), group_size=32), "gguf")
    assert not check
    assert re.search(message, str(check))
