"""A source reads the same integers, and the same other tensors, from every form in which a trained model comes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig

from peft_lrqat.checkpoint.open import open_source
from peft_lrqat.formats.source import Source
from peft_lrqat.grid import GridTensor
from tests.checkpoint.test_merge import read
from tests.models import adapted, logits, low_bit, tiny, tokens, train

BITNET = {"bits": 1.58, "group_size": 0, "act_bits": 8}


def trained(kind: str, base: Path | None = None):
    """An adapted, briefly trained model; its base saved in `base`, so that the adapter can be loaded from a folder."""
    torch.manual_seed(0)
    family = {"gpt2": "gpt2", "bitnet": "llama", "tied": "llama"}.get(kind, "qwen2")
    model = tiny(family, dtype=torch.bfloat16, tie=kind in ("tied", "tokens"), num_hidden_layers=1)
    if base is not None:
        model.save_pretrained(base)
        model.name_or_path = str(base)
    options = {
        "asymmetric": {"bits": 3, "group_size": 8, "symmetric": False, "container_bits": 4},
        "tied": {"bits": 2, "group_size": 0, "container_bits": 4},
        "head": {"modules_to_save": ["lm_head"], "exclude_modules": ["o_proj"]},
        "tokens": {"trainable_token_indices": [3, 5]},
        "gpt2": {"group_size": 8},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "ternary": {"bits": 1.58, "forward": "low_bit"},
        "projected": {"bits": 8, "forward_bits": 1.58, "forward": "low_bit", "learn_scales": True},
        "int8": {"bits": 4, "act_bits": 8, "forward": "low_bit"},
        "w4a8": {"bits": 4, "act_bits": 8},
        "bitnet": {**BITNET, "forward": "low_bit"},
    }[kind]
    make = low_bit if options.pop("forward", None) else adapted
    model = make(model, **options)
    train(model, tokens())
    return model


KINDS = ["asymmetric", "tied", "head", "tokens", "gpt2", "embedding", "ternary", "projected", "int8", "w4a8", "bitnet"]


def contents(source: Source) -> tuple[dict[str, GridTensor], dict[str, torch.Tensor]]:
    return {name: source.layer(name) for name in source.grids()}, dict(source.floats(packed=source.grids()))


def assert_equal(a: GridTensor, b: GridTensor) -> None:
    assert a.grid == b.grid
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)
    assert (a.zero_point is None) == (b.zero_point is None) == a.grid.symmetric
    assert a.grid.symmetric or torch.equal(a.zero_point, b.zero_point)


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_merged_and_saved_models_read_alike(kind: str, tmp_path: Path):
    model = trained(kind, tmp_path / "base")
    before = logits(model, tokens())
    adapter = open_source(model)
    expected, floats = contents(adapter)
    assert torch.equal(logits(model, tokens()), before)
    model.save_pretrained(tmp_path / "adapter")
    sources = [adapter, open_source(tmp_path / "adapter")]
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    saved = {name: t for name, t in read(tmp_path / "merged").items() if not name.endswith("weight_shape")}
    if kind not in ("gpt2", "embedding"):  # merging leaves dense weights there, whose grid is not recorded
        sources += [open_source(merged), open_source(tmp_path / "merged")]
    for source in sources:
        tensors, others = contents(source)
        assert tensors.keys() == expected.keys() == source.grids().keys()
        for name, info in source.grids().items():
            assert_equal(tensors[name], expected[name])
            assert tensors[name].codes.shape == (info.out_features, info.in_features)
            assert (info.grid, info.dtype) == (adapter.grids()[name].grid, torch.bfloat16)
            assert info.container_bits == adapter.grids()[name].container_bits
        assert others.keys() == floats.keys()
        assert all(torch.equal(others[name], floats[name]) for name in floats)
        assert {"weight_scale", "scale_shift"}.isdisjoint(name.rpartition(".")[2] for name in others)
        assert source.rules() == adapter.rules()
        assert (source.recipe, source.scale_dtype) == (adapter.recipe, "auto")
        assert source.config.architectures == [type(merged).__name__]
        assert sorted(source.float_linears) == sorted(adapter.float_linears)
        assert not hasattr(source.config, "quantization_config")
        # nothing packed: every weight comes out dense, under the names and with the values of the merged model
        dense = dict(source.floats())
        state = {n: t for n, t in merged.state_dict().items() if t.is_floating_point() and n in dense}
        assert set(dense) == set(floats) | {name + ".weight" for name in expected}
        assert all(torch.equal(dense[name], state[name]) for name in state)
    dense = {name + ".weight" for name in expected}
    assert set(floats) == {n for n in saved if ".weight_" not in n} - dense


def test_the_grid_is_recorded_in_a_wider_container(tmp_path: Path):
    merged = trained("asymmetric").merge_and_unload()
    merged.save_pretrained(tmp_path)
    grids = open_source(tmp_path).grids().values()
    assert {(g.grid.bits, g.grid.symmetric, g.container_bits) for g in grids} == {(3, False, 4)}
    described = json.loads((tmp_path / "config.json").read_text())
    del described["peft_lrqat"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert {g.grid.bits for g in open_source(tmp_path).grids().values()} == {4}


def test_a_head_trained_apart_is_not_tied(tmp_path: Path):
    model = adapted(tiny("llama", tie=True), modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(1.0)
    source = open_source(model)
    assert source.config.tie_word_embeddings is False
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= dict(source.floats()).keys()
    tied = open_source(adapted(tiny("llama", tie=True)))
    assert tied.config.tie_word_embeddings is True
    assert "lm_head.weight" not in dict(tied.floats())


class TestRefusals:
    def test_models_whose_files_are_cut_otherwise(self, tmp_path):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 96}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
        model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads), dtype=torch.bfloat16)
        model = adapted(model, target_modules=["q_proj"])
        with pytest.raises(ValueError, match="save_pretrained, and export that folder"):
            open_source(model)
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path)
        source = open_source(tmp_path)
        assert list(source.grids()) == ["model.layers.0.self_attn.q_proj"]
        floats = dict(source.floats(source.grids()))
        saved = read(tmp_path)
        assert floats.keys() == {name for name in saved if ".weight_" not in name}

    def test_float_models(self):
        with pytest.raises(ValueError, match="no layer of this package"):
            open_source(tiny())

    def test_float_adapters(self):
        with pytest.raises(ValueError, match="floats"):
            open_source(get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])))

    def test_missing_and_empty_folders(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            open_source(tmp_path / "nowhere")
        with pytest.raises(ValueError, match=r"neither config\.json"):
            open_source(tmp_path)

    def test_float_checkpoints(self, tmp_path):
        tiny().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="float"):
            open_source(tmp_path)

    def test_other_things(self):
        with pytest.raises(ValueError, match="dict"):
            open_source({})

    def test_adapters_without_their_base(self, tmp_path):
        model = trained("ternary")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "gone")
        model.save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match="base model"):
            open_source(tmp_path / "adapter")

    def test_codes_outside_of_the_recorded_grid(self, tmp_path):
        trained("int8").merge_and_unload().save_pretrained(tmp_path)
        described = json.loads((tmp_path / "config.json").read_text())
        described["peft_lrqat"]["bits"] = 2
        (tmp_path / "config.json").write_text(json.dumps(described))
        source = open_source(tmp_path)
        with pytest.raises(ValueError, match="outside of the grid"):
            [source.layer(name) for name in source.grids()]

    def test_truncated_files(self, tmp_path):
        trained("ternary").merge_and_unload().save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(ValueError, match="damaged"):
            open_source(tmp_path)
