"""One row an architecture: a tiny model of it, inputs for it, and what its checkpoints are expected to say.

`python -m tests.architectures` writes the table of docs/reference/architectures.md anew from it. Nothing of this
package is imported here, as the process that judges checkpoints imports this file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 96
PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "architectures.md"
MARKS = ("<!-- made by python -m tests.architectures -->\n", "<!-- end -->\n")
DTYPE = torch.bfloat16

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """A model whose checkpoints go all ways.

    Attributes:
        model: name of its class in transformers.
        config: its configuration's class and fields.
        inputs: what its `forward` takes.
        options: of the adapter.
        early: config.json must say `dequantize`.
        experts: it has experts that transformers joins.
        loads: transformers loads the checkpoint of compressed-tensors; otherwise that of torchao.
        first: what the reloaded model is asked before its first forward, where there is something else to ask.
        floats: for the docs, what stays float besides output layers.
        slow: not run by default.
    """

    model: str
    config: Callable[[], Any]
    inputs: Callable[[], Inputs]
    options: dict[str, Any] = field(default_factory=dict)
    early: bool = False
    experts: bool = False
    loads: bool = True
    first: Callable[[Any, Inputs], torch.Tensor] | None = None
    floats: str = ""
    slow: bool = True

    def build(self) -> PreTrainedModel:
        """The model, with random weights, in eval mode."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return getattr(transformers, self.model)._from_config(self.config(), dtype=DTYPE).eval()

    def batch(self) -> Inputs:
        """The inputs, in the model's dtype."""
        return {name: t.to(DTYPE) if t.is_floating_point() else t for name, t in self.inputs().items()}

    @torch.no_grad()
    def outputs(self, model: Any) -> list[torch.Tensor]:
        """All tensors that the model's `forward` returns."""
        found = model(**self.batch()).to_tuple()
        return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]

    @torch.no_grad()
    def asked_first(self, model: Any) -> torch.Tensor | None:
        """What `first` returns."""
        return None if self.first is None else self.first(model, self.batch())


# -- inputs


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def _ids(length: int = 7, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(seed))


def _text() -> Inputs:
    return {"input_ids": _ids()}


def _two_texts() -> Inputs:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(5, 2)}


def _speech() -> Inputs:
    return {"input_features": _noise(2, 8, 20), "decoder_input_ids": _ids(5, 2)}


def _image() -> Inputs:
    return {"pixel_values": _noise(2, 3, 8, 8)}


def _text_and_image() -> Inputs:
    return {**_text(), **_image()}


def _image_in_text() -> Inputs:
    ids = _ids()
    ids[:, 1:5] = IMAGE
    return {"input_ids": ids, **_image()}


def _patches_in_text() -> Inputs:
    ids = _ids(9)
    ids[:, 1:4] = torch.tensor([START, IMAGE, END])
    grid = torch.tensor([[1, 2, 2], [1, 2, 2]])
    kinds = (ids == IMAGE).long()
    return {"input_ids": ids, "pixel_values": _noise(8, 96), "image_grid_thw": grid, "mm_token_type_ids": kinds}


IMAGE, VIDEO, START, END = 95, 94, 91, 92


# -- configurations


def _of(name: str, **fields: Any) -> Callable[[], Any]:
    """A configuration, made when it is asked for; fields may be configurations to make."""

    def make() -> Any:
        return getattr(transformers, name)(**{k: v() if callable(v) else v for k, v in fields.items()})

    return make


_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_NARROW = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
_TEXT = {**_NARROW, **_SPECIAL, "vocab_size": VOCAB, "num_key_value_heads": 2, "max_position_embeddings": 64}
_HEADS = {**_TEXT, "head_dim": 8}
_SLIDING = {**_HEADS, "sliding_window": 8}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_BERT = {**_NARROW, "vocab_size": VOCAB, "max_position_embeddings": 64}
_VISION = {**_NARROW, "image_size": 8, "patch_size": 4}
_CLIP_TEXT = {**_NARROW, "vocab_size": VOCAB, "max_position_embeddings": 16, "projection_dim": 16, "eos_token_id": 2}
_SEQ2SEQ = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1, **_SPECIAL,
}  # fmt: skip
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
_MARKED = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_PATCHES = {"depth": 1, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_LLAVA = {
    "vision_config": _of("CLIPVisionConfig", **{**_VISION, "num_hidden_layers": 2}),
    "text_config": _of("LlamaConfig", **_TEXT), "image_token_id": IMAGE, "image_seq_length": 4,
}  # fmt: skip
_DEEPSEEK = {
    "num_hidden_layers": 2, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1,
}  # fmt: skip
_ROUTED = {
    "num_hidden_layers": 2, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
_DELTA = {
    "num_hidden_layers": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
_JAMBA = {
    "num_hidden_layers": 4, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
    "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4,
    "mamba_dt_rank": 4,
}  # fmt: skip
_STATE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, **_SPECIAL}


def _generate(model: Any, batch: Inputs) -> torch.Tensor:
    batch = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
    return model.generate(**batch, max_new_tokens=4, do_sample=False)


def _text_features(model: Any, batch: Inputs) -> torch.Tensor:
    found = model.get_text_features(input_ids=batch["input_ids"])
    return found if isinstance(found, torch.Tensor) else found.pooler_output


# -- the table

ARCHITECTURES = {
    "Llama": Architecture("LlamaForCausalLM", _of("LlamaConfig", **_TEXT), _text, slow=False),
    "Mistral": Architecture("MistralForCausalLM", _of("MistralConfig", **_TEXT), _text),
    "Qwen 2": Architecture("Qwen2ForCausalLM", _of("Qwen2Config", **_TEXT), _text),
    "Qwen 3": Architecture("Qwen3ForCausalLM", _of("Qwen3Config", **_HEADS), _text),
    "Gemma 2": Architecture("Gemma2ForCausalLM", _of("Gemma2Config", **_SLIDING), _text),
    "Gemma 3": Architecture("Gemma3ForCausalLM", _of("Gemma3TextConfig", **_SLIDING), _text),
    "Phi 3": Architecture("Phi3ForCausalLM", _of("Phi3Config", **_TEXT), _text, slow=False),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", _of("GPTNeoXConfig", **_BERT), _text, slow=False),
    "Falcon": Architecture(
        "FalconForCausalLM",
        _of("FalconConfig", **_STATE, num_attention_heads=4),
        _text,
        {"group_size": 8},
        early=True,
    ),
    "BLOOM": Architecture("BloomForCausalLM", _of("BloomConfig", **_STATE, n_head=4), _text, slow=False),
    "OPT": Architecture(
        "OPTForCausalLM",
        _of("OPTConfig", **_BERT, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
        _text,
    ),
    "Cohere": Architecture("CohereForCausalLM", _of("CohereConfig", **_TEXT), _text),
    "Granite": Architecture("GraniteForCausalLM", _of("GraniteConfig", **_TEXT), _text),
    "OLMo 2": Architecture("Olmo2ForCausalLM", _of("Olmo2Config", **_TEXT), _text),
    "StarCoder 2": Architecture("Starcoder2ForCausalLM", _of("Starcoder2Config", **_TEXT), _text),
    "Mamba": Architecture(
        "MambaForCausalLM", _of("MambaConfig", **_STATE, state_size=4), _text, early=True
    ),
    "Mamba 2": Architecture(
        "Mamba2ForCausalLM",
        _of("Mamba2Config", **_STATE, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=4),
        _text,
        early=True,
        slow=False,
    ),
    "Jamba": Architecture(
        "JambaForCausalLM",
        _of("JambaConfig", **{**_TEXT, **_JAMBA}),
        _text,
        experts=True,
        floats="experts, with low-bit SR",
    ),
    "Mixtral": Architecture(
        "MixtralForCausalLM",
        _of("MixtralConfig", **_TEXT, num_local_experts=4),
        _text,
        experts=True,
        floats="experts, with low-bit SR",
        slow=False,
    ),
    "Qwen 2 MoE": Architecture(
        "Qwen2MoeForCausalLM",
        _of("Qwen2MoeConfig", **_TEXT, **_EXPERTS, shared_expert_intermediate_size=32),
        _text,
        experts=True,
        floats="experts, with low-bit SR (not the shared one)",
    ),
    "Qwen 3 MoE": Architecture(
        "Qwen3MoeForCausalLM",
        _of("Qwen3MoeConfig", **_HEADS, **_EXPERTS),
        _text,
        experts=True,
        floats="experts, with low-bit SR",
        slow=False,
    ),
    "OLMoE": Architecture(
        "OlmoeForCausalLM",
        _of("OlmoeConfig", **_TEXT, num_experts=4, num_experts_per_tok=2),
        _text,
        experts=True,
        floats="experts, with low-bit SR",
    ),
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        _of("GptOssConfig", **_SLIDING, num_local_experts=4, num_experts_per_tok=2),
        _text,
        floats="experts",
    ),
    "DeepSeek-V3": Architecture(
        "DeepseekV3ForCausalLM",
        _of("DeepseekV3Config", **{**_TEXT, **_DEEPSEEK}),
        _text,
        experts=True,
        floats="experts, with low-bit SR (not the shared one)",
    ),
    "Qwen 3 Next": Architecture(
        "Qwen3NextForCausalLM",
        _of("Qwen3NextConfig", **{**_HEADS, **_EXPERTS, **_DELTA}, shared_expert_intermediate_size=32),
        _text,
        experts=True,
        floats="experts, with low-bit SR (not the shared one)",
    ),
    "Qwen 3.5 MoE": Architecture(
        "Qwen3_5MoeForCausalLM",
        _of("Qwen3_5MoeTextConfig", **{**_HEADS, **_EXPERTS, **_DELTA}, shared_expert_intermediate_size=32),
        _text,
        experts=True,
        floats="experts, with low-bit SR (not the shared one)",
    ),
    "GLM 4 MoE": Architecture(
        "Glm4MoeForCausalLM",
        _of("Glm4MoeConfig", **{**_HEADS, **_EXPERTS, **_ROUTED}),
        _text,
        experts=True,
        floats="experts, with low-bit SR (not the shared one)",
    ),
    "ERNIE 4.5 MoE": Architecture(
        "Ernie4_5_MoeForCausalLM",
        _of(
            "Ernie4_5_MoeConfig", **{**_TEXT, "num_hidden_layers": 2}, moe_intermediate_size=32, moe_num_experts=4,
            moe_k=2,
        ),
        _text,
        experts=True,
        floats="experts, with low-bit SR (not the shared one)",
    ),
    "HunYuan MoE": Architecture(
        "HunYuanMoEV1ForCausalLM",
        _of("HunYuanMoEV1Config", **_HEADS, num_experts=4, moe_topk=2),
        _text,
        experts=True,
        floats="experts, with low-bit SR (not the shared one)",
    ),
    "MiniMax M2": Architecture(
        "MiniMaxM2ForCausalLM",
        _of("MiniMaxM2Config", **_HEADS, num_local_experts=4, num_experts_per_tok=2),
        _text,
        experts=True,
        floats="experts, with low-bit SR",
    ),
    "Phi 3.5 MoE": Architecture(
        "PhimoeForCausalLM",
        _of("PhimoeConfig", **_TEXT, num_local_experts=4, num_experts_per_tok=2),
        _text,
        experts=True,
        floats="experts, with low-bit SR",
    ),
    "Granite MoE": Architecture(
        "GraniteMoeForCausalLM",
        _of("GraniteMoeConfig", **_TEXT, num_local_experts=4, num_experts_per_tok=2),
        _text,
        floats="experts",
    ),
    "BERT": Architecture("BertForMaskedLM", _of("BertConfig", **_BERT), _text, slow=False),
    "T5": Architecture(
        "T5ForConditionalGeneration",
        _of(
            "T5Config", d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4, vocab_size=VOCAB,
            decoder_start_token_id=0,
        ),
        _two_texts,
        early=True,
        first=_generate,
        slow=False,
    ),
    "BART": Architecture(
        "BartForConditionalGeneration",
        _of("BartConfig", **_SEQ2SEQ, max_position_embeddings=64, forced_eos_token_id=None),
        _two_texts,
        early=True,
        first=_generate,
        slow=False,
    ),
    "Whisper": Architecture(
        "WhisperForConditionalGeneration",
        _of(
            "WhisperConfig", **_SEQ2SEQ, num_mel_bins=8, max_source_positions=10, max_target_positions=20,
            suppress_tokens=None, begin_suppress_tokens=None,
        ),
        _speech,
        early=True,
        first=_generate,
        slow=False,
    ),
    "ViT": Architecture("ViTForImageClassification", _of("ViTConfig", **_VISION), _image, slow=False),
    "DINOv2": Architecture(
        "Dinov2ForImageClassification",
        _of(
            "Dinov2Config", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4,
            mlp_ratio=2,
        ),
        _image,
        early=True,
        loads=False,
        slow=False,
    ),
    "CLIP": Architecture(
        "CLIPModel",
        _of("CLIPConfig", text_config=_CLIP_TEXT, vision_config={**_VISION, "projection_dim": 16}, projection_dim=16),
        _text_and_image,
        early=True,
        first=_text_features,
        slow=False,
    ),
    "Llava": Architecture(
        "LlavaForConditionalGeneration",
        _of("LlavaConfig", **_LLAVA),
        _image_in_text,
        {"exclude_modules": r".*(vision_tower|projector).*"},
        early=True,
        floats="vision tower and projector (`exclude_modules`)",
        slow=False,
    ),
    "Gemma 3, with its vision tower": Architecture(
        "Gemma3ForConditionalGeneration",
        _of(
            "Gemma3Config",
            text_config=_of("Gemma3TextConfig", **_SLIDING),
            vision_config=_of("SiglipVisionConfig", **_VISION, vision_use_head=False),
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        ),
        _image_in_text,
        early=True,
        slow=False,
    ),
    "Qwen 2 VL": Architecture(
        "Qwen2VLForConditionalGeneration",
        _of(
            "Qwen2VLConfig",
            text_config={**_TEXT, "rope_scaling": _ROPE},
            vision_config={**_PATCHES, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
            **_MARKED,
        ),
        _patches_in_text,
        early=True,
    ),
    "Qwen 2.5 VL": Architecture(
        "Qwen2_5_VLForConditionalGeneration",
        _of(
            "Qwen2_5_VLConfig",
            text_config={**_TEXT, "rope_scaling": _ROPE},
            vision_config={
                **_PATCHES, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "window_size": 16,
                "fullatt_block_indexes": [0],
            },
            **_MARKED,
        ),
        _patches_in_text,
        early=True,
        slow=False,
    ),
}  # fmt: skip


# -- the docs


def table() -> str:
    """The table of docs/reference/architectures.md."""
    lines = ["| architecture | class | stays float | transformers loads the merged checkpoint |", "|---|---|---|---|"]
    for name, row in ARCHITECTURES.items():
        loads = "yes, decompressed while loading" if row.early else "yes"
        loads = loads if row.loads else "no; as `torchao`, yes"
        lines.append(f"| {name}{' °' * row.slow} | `{row.model}` | {row.floats} | {loads} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """A page with the table between the marks."""
    before, rest = text.split(MARKS[0])
    return before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit()
