"""A model in memory, merged or adapted, as a source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from peft_lrqat import LRQATConfig, preprocess_gptq
from peft_lrqat.checkpoint.open import open_source
from tests.files import read
from tests.models import adapted, tiny, tokens
from tests.trained import trained


def test_a_head_trained_apart_is_not_tied(tmp_path: Path):
    model = adapted(tiny("llama", tie=True), modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(1.0)
    source = open_source(model)
    assert source.config.tie_word_embeddings is False
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= dict(source.floats()).keys()
    tied = open_source(adapted(tiny("llama", tie=True)))
    assert tied.config.tie_word_embeddings is True
    assert "lm_head.weight" not in dict(tied.floats())


def test_models_whose_files_are_cut_otherwise(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads), dtype=torch.bfloat16)
    model = adapted(model, target_modules=["q_proj"])
    adapted_floats = dict(open_source(model).floats(["model.layers.0.self_attn.q_proj"]))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    saved = {name: tensor for name, tensor in read(tmp_path).items() if ".weight_" not in name}
    assert any("experts.1.w2" in name for name in saved)  # one tensor of the model
    for source in (open_source(tmp_path), open_source(merged)):
        assert list(source.grids()) == ["model.layers.0.self_attn.q_proj"]
        floats = dict(source.floats(source.grids()))
        assert floats.keys() == saved.keys() == adapted_floats.keys()
        assert all(torch.equal(floats[name], tensor) for name, tensor in saved.items())


def test_float_models():
    with pytest.raises(ValueError, match=r"no layer of this package.*Train it with LRQATConfig"):
        open_source(tiny())


def test_float_adapters():
    with pytest.raises(ValueError, match="floats"):
        open_source(get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])))


def test_adapters_of_a_quantized_base_that_name_a_float_one(tmp_path):
    tiny().save_pretrained(tmp_path / "float")
    model = tiny()
    preprocess_gptq(model, LRQATConfig(group_size=-1, task_type="CAUSAL_LM"), [tokens()], progressbar=False)
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "float")  # as it is of a model that was loaded from there
    trained_on_it = get_peft_model(model, LRQATConfig(task_type="CAUSAL_LM"))
    trained_on_it.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"trained on a quantized base, but `base_model_name_or_path`.*float'.*Put the"
    ):
        open_source(tmp_path / "adapter")
    trained_on_it.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    trained_on_it.save_pretrained(tmp_path / "adapter")
    assert open_source(tmp_path / "adapter").grids()


def test_adapters_without_their_base(tmp_path):
    model = trained("ternary")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "gone")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"The base model '.*gone' .* cannot be loaded \(.*\)\. Load it yourself"):
        open_source(tmp_path / "adapter")
    model.peft_config["default"].base_model_name_or_path = "gone"  # from where it was trained
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="If it is a folder, do this where the adapter was trained"):
        open_source(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("left", "says"),
    [
        (0, r"lacks tensors that its adapter_config\.json asks for, e\.g\. '.*proj\.lora_"),
        (5, "has a part of module '.*_proj', but not '.*proj.lora_"),
    ],
)
def test_adapters_whose_file_lacks_tensors(left: int, says: str, tmp_path):
    """PEFT warns, and the layers would be those of before training; the command would call them the trained ones."""
    tiny().save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    assert open_source(tmp_path / "adapter").grids()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[:left]), file)
    with pytest.raises(ValueError, match=says):
        open_source(tmp_path / "adapter")
