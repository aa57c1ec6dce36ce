"""DeepSeek's attention as GGUF: both of llama.cpp's ways to compute it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_lrqat import can_export, export
from peft_lrqat.checkpoint.verify import verify
from peft_lrqat.formats.gguf.reader import GGUFFile
from tests.ggml import Llama
from tests.mixtures import of_family, on_experts
from tests.models import logits

IDS = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(1))
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16,
    "mscale": 0.7, "mscale_all_dim": 0.7,
}  # fmt: skip
WHOLE, SPLIT = "blk.1.attn_kv_b.weight", "blk.1.attn_k_b.weight"


@pytest.mark.parametrize(
    ("settings", "options", "tensor"),
    [
        ({"rope_parameters": YARN}, {}, WHOLE),
        ({"rope_parameters": YARN}, {"exclude_modules": ["kv_b_proj"]}, SPLIT),
        ({"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "tie_word_embeddings": True}, {}, WHOLE),
    ],
    ids=["yarn", "yarn, float kv_b_proj", "no groups"],
)
def test_llama_cpp_computes_what_transformers_does(settings: dict, options: dict, tensor: str, tmp_path: Path):
    merged = on_experts(of_family("deepseek_v3", **settings), group_size=32, **options).merge_and_unload()
    report = export(merged, tmp_path / "out", format="gguf", vocabulary=False, progress=False, type="f32")
    path = next((tmp_path / "out").glob("*.gguf"))
    assert tensor in GGUFFile(path).tensors
    assert any("exclude_modules" in note for note in report.notes) == (tensor == WHOLE)
    with Llama(path) as llama:
        found = llama.logits(IDS[0].tolist())
    assert (found - logits(merged, IDS)[0]).abs().max() < 1e-5
    assert verify(path, merged)


def test_queries_without_a_latent(tmp_path: Path):
    sizes = {"num_hidden_layers": 27, "first_k_dense_replace": 26, "q_lora_rank": None, "rms_norm_eps": 1e-5}
    model = of_family("deepseek_v3", **sizes)
    merged = on_experts(model, group_size=32, target_modules=["o_proj"]).merge_and_unload()
    report = export(merged, tmp_path / "out", format="gguf", vocabulary=False, progress=False)
    assert any("normalizes latents with `rms_norm_eps` (1e-05)" in note for note in report.notes)
    with Llama(next((tmp_path / "out").glob("*.gguf"))) as llama:
        assert torch.isfinite(llama.logits(IDS[0].tolist())).all()


def test_layers_that_predict_more_tokens_are_left_out(tmp_path: Path):
    model = on_experts(of_family("deepseek_v3"), group_size=32, target_modules=["o_proj"]).merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    state = load_file(tmp_path / "merged" / "model.safetensors")
    state["model.layers.2.eh_proj.weight"] = torch.ones(64, 128)
    save_file(state, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    report = export(tmp_path / "merged", tmp_path / "out", format="gguf", vocabulary=False, progress=False)
    assert any("1 tensors are left out, e.g. model.layers.2.eh_proj.weight" in note for note in report.notes)
    assert verify(tmp_path / "out", tmp_path / "merged")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_interleave": False}, "`rope_interleave` is False"),
        ({"q_lora_rank": None}, "`q_lora_rank` is None with 2 layers"),
        ({"rope_parameters": {**YARN, "mscale": 1.0}}, "`mscale` is 1.0 and `mscale_all_dim` is 0.7"),
        ({"rope_parameters": {k: v for k, v in YARN.items() if "mscale" not in k}}, "`mscale` is None"),
        ({"attention_bias": True}, "`attention_bias`"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(settings: dict[str, Any], message: str):
    model = on_experts(of_family("deepseek_v3", **settings), group_size=32, target_modules=["o_proj"])
    check = can_export(model, "gguf")
    assert not check
    assert message in str(check)
