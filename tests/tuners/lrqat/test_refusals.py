"""Bad input: an error that says what to do, before anything is changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraRuntimeConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from peft_lrqat import LRQATConfig
from peft_lrqat.tuners.lrqat import LRQATLinear
from tests.models import adapted, logits, tiny, tokens

IDS = tokens()


def config(**options: Any) -> LRQATConfig:
    return LRQATConfig(**{"bits": 4, "group_size": 8, "r": 4, "target_modules": "all-linear", **options})


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().view(torch.uint8) if value.ndim else value  # NaN equals NaN bit by bit


@contextmanager
def refused(model: nn.Module, match: str) -> Iterator[None]:
    """A ValueError that matches, and a model whose modules and tensors are what they were."""
    types = {name: type(module) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        yield
    assert {name: type(module) for name, module in model.named_modules()} == types
    after = model.state_dict()
    assert after.keys() == state.keys()
    for name, value in state.items():
        assert after[name].dtype == value.dtype
        assert after[name].device == value.device
        if not value.is_meta:
            assert torch.equal(_bits(after[name]), _bits(value))
    assert not any("lora_" in name for name, _ in model.named_parameters())


# -- configurations


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 1}, "`bits` is 1; it must be an integer from 2 to 8"),
        ({"bits": 9}, "`bits` is 9"),
        ({"bits": 4.0}, "`bits` is 4.0"),
        ({"bits": True}, "`bits` is True"),
        ({"group_size": -2}, "`group_size` is -2"),
        ({"group_size": 12.5}, "`group_size` is 12.5"),
        ({"downcast": "int4"}, "`downcast` is 'int4'; allowed are 'fx8'"),
        ({"bits": 8, "downcast": "fx8"}, "Use 'int'"),
        ({"range_method": "mse"}, "`range_method` is 'mse'"),
        ({"range_p": 0}, "`range_p` is 0"),
        ({"scale_dtype": "fp8"}, "`scale_dtype` is 'fp8'"),
        ({"container_bits": 3}, "`container_bits` is 3"),
        ({"act_bits": 4}, "`act_bits` is 4; allowed are None and 8"),
        ({"act_bits": 8, "group_size": 16}, r"`act_bits` is 8 with `group_size=16`.*output channel \(-1\)"),
        ({"act_bits": 8, "group_size": -1, "symmetric": False}, "`act_bits` is 8 with `symmetric=False`"),
        ({"act_bits": 8, "group_size": -1, "container_bits": 4}, "`container_bits` is 4 with `act_bits=8`"),
        ({"lora_dropout": 0.1}, "`lora_dropout` is 0.1"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` is 'pissa'; LR-QAT knows True, False and 'loftq'"),
        ({"init_lora_weights": "gaussian"}, "`init_lora_weights` is 'gaussian'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 4}}, "only 1 is supported"),
        ({"use_dora": True}, "`use_dora`"),
        ({"lora_bias": True}, "`lora_bias`"),
        ({"layer_replication": [(0, 2)]}, "`layer_replication`"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "`target_parameters`"),
        ({"use_qalora": True}, "`use_qalora`"),
        ({"alora_invocation_tokens": [1]}, "`alora_invocation_tokens`"),
        ({"r": 0}, "`r`"),
        pytest.param(
            {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)},
            "`ephemeral_gpu_offload` is True, but torch finds no accelerator",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one"),
        ),
    ],
)
def test_options_out_of_range_or_of_another_method(options: dict, match: str):
    model = tiny()
    with refused(model, match):
        get_peft_model(model, config(**options))


# -- base models


def _poisoned(value: float) -> Callable[[PreTrainedModel], PreTrainedModel]:
    def make(model: PreTrainedModel) -> PreTrainedModel:
        # the last module that would be converted: all others come before it
        model.model.layers[-1].mlp.down_proj.weight.data[3, 5] = value
        return model

    return make


def _on_meta(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[-1].mlp.down_proj.to("meta")
    return model


def _in_dtype(dtype: torch.dtype) -> Callable[[PreTrainedModel], PreTrainedModel]:
    def make(model: PreTrainedModel) -> PreTrainedModel:
        layer = model.model.layers[-1].mlp.down_proj
        layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
        return model

    return make


def _says_quantized(model: PreTrainedModel) -> PreTrainedModel:
    model.config.quantization_config = {"quant_method": "gptq"}
    return model


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        (_poisoned(float("nan")), {}, "layers.1.mlp.down_proj.*NaN or infinite"),
        (_poisoned(float("inf")), {}, "layers.1.mlp.down_proj.*NaN or infinite"),
        (_on_meta, {}, "layers.1.mlp.down_proj.*meta device.*Load the model with its weights"),
        (_in_dtype(torch.float64), {}, "float64; LR-QAT needs float32, bfloat16 or float16"),
        (_in_dtype(torch.int8), {}, "int8; LR-QAT needs float32"),
        (_in_dtype(torch.float8_e4m3fn), {}, "float8_e4m3fn; LR-QAT needs float32"),
        (_says_quantized, {}, r"already quantized \(gptq\)"),
        (lambda m: m, {"group_size": 32}, r"does not divide the 48 input features.*down_proj.*Use one of \[48, 24, 16"),
        (lambda m: m, {"target_modules": ["act_fn"]}, "quantizes nn.Linear, Conv1D and nn.Embedding only"),
        (lambda m: m, {"target_modules": ["no_such_module"]}, "no_such_module"),
        (
            lambda m: m,
            {"target_modules": ["embed_tokens"], "group_size": -1, "act_bits": 8},
            "`act_bits` is 8, but module 'model.embed_tokens' is an embedding",
        ),
        (lambda m: m.bfloat16(), {"scale_dtype": "fp16"}, "`scale_dtype` is 'fp16'.*'auto' is exact everywhere"),
    ],
)
def test_base_models_that_cannot_be_converted(change: Callable, options: dict, match: str):
    model = change(tiny())
    with refused(model, match):
        get_peft_model(model, config(**options))
    with refused(model, match):
        model.add_adapter(config(**options))


def test_layers_of_ones_own_are_refused():
    model, own = tiny(), config()
    own._register_custom_module({nn.Linear: nn.Linear})
    with refused(model, "_register_custom_module"):
        get_peft_model(model, own)


def test_a_merged_model_is_not_rounded_to_another_grid():
    merged = adapted(tiny()).merge_and_unload()
    with refused(merged, "asks for group_size=8, but the base model is quantized with group_size=-1"):
        get_peft_model(merged, config())


def test_a_tied_head_is_refused_and_the_remedy_works():
    model = tiny(tie=True)
    with refused(model, "tied to 'lm_head'.*untie it first"):
        get_peft_model(model, config(target_modules=["embed_tokens"]))
    with refused(model, "tied to 'model.embed_tokens'.*untie it first"):
        get_peft_model(model, config(target_modules=["q_proj", "lm_head"]))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert logits(get_peft_model(model, config(target_modules=["q_proj", "lm_head"])), IDS).isfinite().all()


def test_layers_of_a_shared_block_are_not_tied_but_shared_layers_are():
    block = nn.ModuleDict({"up": nn.Linear(16, 16)})
    model = get_peft_model(nn.ModuleList([block, block]), config(target_modules=["up"])).base_model.model
    assert model[0].up is model[1].up
    assert isinstance(model[0].up, LRQATLinear)
    layer = nn.Linear(16, 16)
    shared = nn.ModuleDict({"a": layer, "b": layer})
    with refused(shared, "tied to 'b'"):
        get_peft_model(shared, config(target_modules=["a"]))


def test_methods_are_not_mixed_on_one_model():
    model = adapted(tiny())
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    assert list(model.peft_config) == ["default"]


# -- further adapters


def test_adapters_of_one_model_share_the_rounding_of_activations():
    model = adapted(tiny(), bits=4, group_size=-1)
    with pytest.raises(ValueError, match=r"share its converted base.*act_bits=8"):
        model.add_adapter("other", config(bits=4, group_size=-1, act_bits=8))


@pytest.mark.parametrize("option", [{"bits": 3}, {"group_size": 16}, {"symmetric": False}, {"downcast": "int"}])
def test_adapters_of_one_model_share_a_grid(option: dict):
    model = adapted(tiny(), bits=4, group_size=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"share its converted base.*{next(iter(option))}="):
        model.add_adapter("other", config(**option))
    assert list(model.peft_config) == ["default"]
    assert model.state_dict().keys() == before.keys()


def test_loftq_needs_the_float_weight():
    model = adapted(tiny())
    with pytest.raises(ValueError, match=r"needs the float weight.*first adapter"):
        model.add_adapter("other", config(group_size=-1, init_lora_weights="loftq"))


# -- adapter files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapted(tiny(), bits=4, group_size=8, init_lora_weights=False).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may damage."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_another_base_model(folder: Path):
    for seed, change in ((1, None), (0, "model.layers.1.mlp.down_proj.weight")):
        model = tiny(seed=seed)
        if change is not None:  # one weight of the last module, by the least that fp32 can hold
            weight = model.get_parameter(change).data
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
        for load in (lambda m: PeftModel.from_pretrained(m, folder), lambda m: m.load_adapter(str(folder))):
            with refused(model, "trained on another base.*`base_model_name_or_path`"):
                load(model)


@pytest.mark.parametrize("other", [{"intermediate_size": 64}, {"num_hidden_layers": 3}, {"hidden_size": 64}])
def test_another_architecture(folder: Path, other: dict):
    model = tiny(**other)
    for load in (lambda m: PeftModel.from_pretrained(m, folder), lambda m: m.load_adapter(str(folder))):
        with refused(model, "trained on another base"):
            load(model)


def test_other_bits_beside_a_loaded_adapter(folder: Path):
    model = adapted(tiny(), bits=3, group_size=8, init_lora_weights=False).eval()
    before = logits(model, IDS)
    with pytest.raises(ValueError, match=r"bits=4.*bits=3.*fresh copy"):
        model.load_adapter(folder, adapter_name="other")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, IDS), before)


def test_other_groups_than_the_file_has(folder: Path):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "group_size": 16}))
    model = tiny()
    with refused(model, "lora_scale_shift' has shape.*group size"):
        PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("keep", [0, 7, 200, -100])
def test_a_truncated_file(folder: Path, keep: int):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    model = tiny()
    with refused(model, "truncated or damaged.*copy or download it again"):
        PeftModel.from_pretrained(model, folder)


def test_a_file_that_lacks_a_tensor_is_loaded_with_pefts_warning(folder: Path):
    path = folder / "adapter_model.safetensors"
    values = load_file(path)
    del values["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(values, path)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*layers.1.mlp.up_proj.lora_B"):
        PeftModel.from_pretrained(tiny(), folder)


def test_weights_of_another_base_in_an_existing_adapter(folder: Path):
    # the Trainer's way of resuming: the adapter exists, and only values are loaded
    model = adapted(tiny(seed=1), bits=4, group_size=8, init_lora_weights=False).eval()
    before = logits(model, IDS)
    with pytest.raises(ValueError, match="trained on another base: the integers of module"):
        model.load_adapter(folder, adapter_name="default")
    assert torch.equal(logits(model, IDS), before)


# -- merged layers


def test_a_merged_layers_weight_cannot_be_changed_in_place():
    merged = adapted(tiny()).merge_and_unload()
    layer = merged.model.layers[0].mlp.up_proj
    packed = layer.weight_packed.clone()
    with pytest.raises(RuntimeError, match="second rounding"):
        layer.weight.data += 1
    float_adapter = get_peft_model(merged, LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    with pytest.raises((RuntimeError, ValueError, AttributeError)):
        float_adapter.merge_adapter()
    assert torch.equal(layer.weight_packed, packed)


def test_ungathered_shards_are_not_saved_silently(tmp_path: Path):
    model = adapted(tiny(), target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight.data = torch.zeros(32)
    with pytest.warns(UserWarning, match="ZeRO-3 / FSDP shards"):
        model.save_pretrained(tmp_path)


def test_checks_leave_a_float_model_usable():
    model = tiny()
    before = logits(model, IDS)
    with pytest.raises(ValueError, match="does not divide"):
        get_peft_model(model, config(group_size=128))
    assert torch.equal(logits(model, IDS), before)
    assert logits(get_peft_model(model, config()), IDS).isfinite().all()


def test_a_model_that_was_dequantized_on_loading_is_a_float_model():
    model = tiny()
    model.is_quantized = True  # as transformers' GGUF loader leaves it
    model.config.quantization_config = {"quant_method": "gguf"}
    with refused(model, r"already quantized \(gguf\).*delete `model.config.quantization_config`"):
        get_peft_model(model, config())
    del model.config.quantization_config
    assert isinstance(get_peft_model(model, config()), PeftModel)
