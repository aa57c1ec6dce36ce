"""Bad input: an error that says what to do, before anything is changed. (`test_undo.py`: errors that come later.)"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_lrqat import LowBitSRConfig, LRQATConfig
from tests import refusals
from tests.models import logits, tiny, tokens
from tests.refusals import refused

IDS = tokens()


def same(model: nn.Module) -> nn.Module:
    return model


# -- options that both methods have


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 1}, "`bits` is 1;"),
        ({"bits": 16}, "`bits` is 16"),
        ({"bits": True}, "`bits` is True"),
        ({"group_size": -2}, "`group_size` is -2"),
        ({"group_size": 12.5}, "`group_size` is 12.5"),
        ({"group_size": True}, "`group_size` is True"),
        ({"range_method": "mse"}, "`range_method` is 'mse'"),
        ({"range_p": 0}, "`range_p` is 0; it must be a positive number"),
        ({"range_p": True}, "`range_p` is True"),
        ({"range_p": float("nan")}, "`range_p` is nan"),
        ({"scale_dtype": "fp8"}, "`scale_dtype` is 'fp8'; allowed are 'auto'"),
        ({"learn_scales": "yes"}, "`learn_scales` is 'yes'; allowed are True, False"),
        ({"learn_scales": 1}, "`learn_scales` is 1"),
        ({"container_bits": 3}, "`container_bits` is 3.*take 4 bits; it must be an integer from 4 to 8"),
        ({"container_bits": 9}, "`container_bits` is 9"),
        ({"container_bits": True}, "`container_bits` is True"),
        ({"act_bits": 2}, "`act_bits` is 2; allowed are None, 8, 4"),
        ({"act_group_size": 8}, "`act_group_size` is 8, but no input is rounded"),
        ({"act_bits": 16, "act_rule": "vllm"}, "`act_bits` is 16"),
        ({"act_bits_pattern": {"q_proj": None}, "act_rule": "vllm"}, "`act_rule` is 'vllm', but no input is rounded"),
        ({"act_bits": 8, "act_rule": "cutlass"}, "`act_rule` is 'cutlass'; allowed are 'transformers', 'vllm'"),
        ({"act_bits": 8, "act_bits_pattern": {"q_proj": 3}}, r"`act_bits_pattern\['q_proj'\]` is 3; allowed are None"),
        ({"bias": "some"}, "`bias` is 'some'; allowed are 'none', 'all', "),
        ({"bias": True}, "`bias` is True"),
        ({"layers_to_transform": "1"}, "`layers_to_transform` is '1'"),
        ({"layers_to_transform": [True]}, r"`layers_to_transform` is \[True\]"),
        ({"modules_to_save": "lm_head"}, "`modules_to_save` is 'lm_head'; it must be a list of module names"),
        ({"modules_to_save": [3]}, r"`modules_to_save` is \[3\]"),
        ({"trainable_token_indices": 3}, "`trainable_token_indices` is 3; it must be a list of token indices"),
        ({"trainable_token_indices": [-1]}, r"`trainable_token_indices` is \[-1\]"),
        ({"trainable_token_indices": [True]}, r"`trainable_token_indices` is \[True\]"),
        ({"trainable_token_indices": ["a"]}, r"`trainable_token_indices` is \['a'\]"),
        ({"trainable_token_indices": {"embed_tokens": 3}}, "`trainable_token_indices` is {'embed_tokens': 3}"),
    ],
)
def test_options_out_of_range(method: ModuleType, options: dict, match: str):
    with pytest.raises(ValueError, match=match):
        method.config(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"modules_to_save": ["no_such"]}, "`modules_to_save` names 'no_such', but no module"),
        ({"modules_to_save": ["layers"]}, "names 'model.layers', a ModuleList, which has no forward"),
        ({"trainable_token_indices": [3, 96]}, "has 96, but 'model.embed_tokens' has 96 rows"),
        ({"trainable_token_indices": {"no_such": [3]}}, "`trainable_token_indices` names 'no_such', but no module"),
        ({"trainable_token_indices": {"q_proj": [3]}}, "names 'model.layers.0.self_attn.q_proj', which is quantized"),
        (
            {"trainable_token_indices": {"lm_head": [3]}, "modules_to_save": ["lm_head"]},
            "'lm_head' is both in `modules_to_save` and in `trainable_token_indices`",
        ),
        ({"layers_to_transform": [7], "target_modules": ["q_proj"]}, "not found in the base model"),
        ({"layers_to_transform": [0], "layers_pattern": "x", "target_modules": ["q_proj"]}, "not found in the base"),
        (
            {"target_modules": ["no_such", "c_attn"]},
            r"\['c_attn', 'no_such'\], but no module.*are called 'down_proj', ",
        ),
        ({"target_modules": "all_linear"}, r"`target_modules` is 'all_linear'\. Did you mean 'all-linear'\?"),
        ({"target_modules": ["act_fn"]}, "`target_modules` names module.*SiLU.*quantizes nn.Linear"),
        ({"target_modules": "all-linear", "exclude_modules": ".*"}, "excluded"),
        ({"act_bits": 8, "act_group_size": 7}, "`act_group_size` is 7, which does not divide the 32 input features"),
        ({"act_bits": 8, "act_bits_pattern": {"down": 4}}, "`act_bits_pattern` has 'down', but that is the name of no"),
        ({"group_size": 32}, r"does not divide the 48 input features.*down_proj.*Use one of \[16, 8, 4, 2\] or -1"),
    ],
)
def test_options_that_do_not_fit_the_model(method: ModuleType, options: dict, match: str):
    model, config = tiny(), method.config(**options)
    for add in (lambda: get_peft_model(model, config), lambda: model.add_adapter(config)):
        with refused(model, match, config=config):
            add()
    adapted = method.random_adapter(tiny())
    shared = "group_size" in options or ("act_bits" in options and method.NAME == "LR-QAT")
    with refused(adapted, "share its converted base" if shared else match, config=config):
        adapted.add_adapter("second", config)


def test_modules_to_save_of_a_second_adapter_that_hold_layers_of_the_first(method: ModuleType):
    model = method.random_adapter(tiny())
    for wanted in ("mlp", "up_proj"):
        config = method.config(modules_to_save=[wanted])
        with refused(model, "names '.*layers.0.mlp.*', which is quantized, or has", config=config):
            model.add_adapter("second", config)


def test_an_invalid_regular_expression(method: ModuleType):
    with pytest.raises(
        ValueError, match=r"`target_modules` is '\('; it must be 'all-linear', a list of names.*or a regular"
    ):
        method.config(target_modules="(")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (" a", "must be a string without spaces around it"),
        ("v1.0", "contains '.'"),
        ("a/b", "contains '/'"),
        ("..", "contains '.'"),
        ("a\nb", r"contains '\\n'"),
        ("keys", "name of an attribute or of a method"),
        ("train", "name of an attribute or of a method"),
        ("__base__", "name of an attribute or of a method"),
        ("base_layer", "part of the names of the model's own tensors"),
        ("q_proj", "part of the names of the model's own tensors"),
        ("layers", "part of the names of the model's own tensors"),
        ("0", "part of the names of the model's own tensors"),
        ("weight", "part of the names of the model's own tensors"),
    ],
)
def test_names_of_adapters_that_files_could_not_tell_apart(method: ModuleType, name, match: str):
    model, config = tiny(), method.config(target_modules=["up_proj"])
    with refused(model, match, config=config):
        get_peft_model(model, config, adapter_name=name)
    with refused(model, match, config=config):
        model.add_adapter(config, name)


# -- base models


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        (refusals.poisoned(float("nan")), {}, "layers.1.mlp.down_proj.*NaN or infinite"),
        (refusals.poisoned(float("inf")), {}, "layers.1.mlp.down_proj.*NaN or infinite"),
        (refusals.on_meta, {}, "layers.1.mlp.down_proj.*meta device.*Load the model with its weights"),
        (refusals.in_dtype(torch.float64), {}, "float64; .* needs float32, bfloat16 or float16"),
        (refusals.in_dtype(torch.int8), {}, "int8; .* needs float32"),
        (refusals.in_dtype(torch.float8_e4m3fn), {}, "float8_e4m3fn; .* needs float32"),
        (refusals.says_quantized, {}, r"already quantized \(gptq\), but .* starts from float"),
        (refusals.without_features, {}, r"layers.1.mlp.down_proj.*has shape \(32, 0\).*nothing to quantize"),
        (lambda m: m.bfloat16(), {"scale_dtype": "fp32"}, "`scale_dtype` is 'fp32'.*'auto' is exact everywhere"),
    ],
)
def test_base_models_that_cannot_be_converted(method: ModuleType, change: Callable, options: dict, match: str):
    model, config = change(tiny()), method.config(**options)
    with refused(model, match, config=config):
        get_peft_model(model, config)
    with refused(model, match, config=config):
        model.add_adapter(config)


def test_checks_leave_a_float_model_usable(method: ModuleType):
    model = tiny()
    before = logits(model, IDS)
    with pytest.raises(ValueError, match="does not divide"):
        get_peft_model(model, method.config(group_size=128))
    assert torch.equal(logits(model, IDS), before)
    assert logits(get_peft_model(model, method.config()), IDS).isfinite().all()


def test_a_model_that_was_dequantized_on_loading_is_a_float_model(method: ModuleType):
    model = tiny()
    model.is_quantized = True  # as transformers' GGUF loader leaves it
    model.config.quantization_config = {"quant_method": "gguf"}
    with refused(model, r"already quantized \(gguf\).*delete `model.config.quantization_config`"):
        get_peft_model(model, method.config())
    del model.config.quantization_config
    assert isinstance(get_peft_model(model, method.config()), PeftModel)


def test_a_tied_head_is_refused_and_the_remedy_works(method: ModuleType):
    model = tiny(tie=True)
    with refused(model, "tied to 'model.embed_tokens'.*untie it first"):
        get_peft_model(model, method.config(target_modules=["q_proj", "lm_head"]))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert logits(get_peft_model(model, method.config(target_modules=["q_proj", "lm_head"])), IDS).isfinite().all()


def test_layers_of_a_shared_block_are_not_tied_but_shared_layers_are(method: ModuleType):
    block = nn.ModuleDict({"up": nn.Linear(16, 16)})
    model = get_peft_model(nn.ModuleList([block, block]), method.config(target_modules=["up"])).base_model.model
    assert model[0].up is model[1].up
    assert method.layers(model)
    layer = nn.Linear(16, 16)
    shared = nn.ModuleDict({"a": layer, "b": layer})
    with refused(shared, "tied to 'b'"):
        get_peft_model(shared, method.config(target_modules=["a"]))


class Both(nn.Module):
    """A layer whose weight the module around it multiplies with, too."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.again = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.up(x), self.again)


def test_a_weight_that_has_another_name_is_tied(method: ModuleType):
    with refused(model := Both(), r"weight of module 'up' \(Linear\) is tied to 'again', which would stay float"):
        get_peft_model(model, method.config(target_modules=["up"]))


@pytest.mark.parametrize("part", ["model", "block"])
def test_compiled_modules_have_names_that_no_file_fits(method: ModuleType, part: str):
    model = tiny()
    if part == "block":
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    compiled = torch.compile(model, backend="eager") if part == "model" else model
    with refused(compiled, r"_orig_mod.* is inside of a compiled module.*Adapt the model first and compile it then"):
        get_peft_model(compiled, method.config())
    torch.compile(method.random_adapter(tiny()), backend="eager")(input_ids=IDS)


# -- further adapters


def test_methods_are_not_mixed_on_one_model(method: ModuleType):
    model = method.adapt(tiny())
    with refused(model, "different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    assert list(model.peft_config) == ["default"]


def test_a_model_is_wrapped_once(method: ModuleType):
    """PEFT would look for targets in the PeftModel, where "all-linear" does not know the output layer."""
    model = method.random_adapter(tiny())
    before = logits(model, IDS)
    for config in (LRQATConfig(), LowBitSRConfig()):
        with (
            pytest.warns(UserWarning, match="second time"),
            pytest.raises(ValueError, match=r"`model` is a PeftModel already, with the adapters \['default'\]"),
        ):
            get_peft_model(model, config)
    assert torch.equal(logits(model, IDS), before)
    with pytest.raises(ValueError, match="has a LoraConfig, but the layers of this model are those of"):
        get_peft_model(model.get_base_model(), LoraConfig(target_modules="all-linear"))


def test_a_name_is_no_model(method: ModuleType, folder: Path):
    with pytest.raises(ValueError, match=r"`model` is 'name'; it must be a model\. Load it first"):
        PeftModel.from_pretrained("name", folder)


def test_layers_that_carry_an_adapter_of_another_method(method: ModuleType):
    model, config = tiny(), method.config()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "first")
    with refused(model, "q_proj' .* carries an adapter of another method", config=config):
        model.add_adapter(config, "second")


@pytest.mark.parametrize("option", [{"bits": 3}, {"group_size": 16}, {"range_method": "lp"}, {"scale_dtype": "fp32"}])
def test_adapters_of_one_model_share_a_grid(method: ModuleType, option: dict):
    model = method.adapt(tiny(), bits=4, group_size=8, range_method="minmax")
    config = method.config(**{"range_method": "minmax", **option})
    with refused(model, f"share its converted base.*{next(iter(option))}=", config=config):
        model.add_adapter("other", config)
    assert list(model.peft_config) == ["default"]


# -- adapter files


def test_another_base_model(method: ModuleType, folder: Path):
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


def test_other_bits_beside_a_loaded_adapter(method: ModuleType, folder: Path):
    model = method.random_adapter(tiny(), bits=3)
    with refused(model, r"bits=4.*bits=3.*fresh copy"):
        model.load_adapter(folder, adapter_name="other")
    assert list(model.peft_config) == ["default"]


def test_other_groups_than_the_file_has(folder: Path):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "group_size": 16}))
    with refused(model := tiny(), "has shape.*group size"):
        PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("keep", [0, 7, 200, -100])
def test_a_truncated_file(folder: Path, keep: int):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with refused(model := tiny(), "truncated or damaged.*copy or download it again"):
        PeftModel.from_pretrained(model, folder)


def test_a_file_that_lacks_a_layer_is_loaded_with_pefts_warning(folder: Path):
    path = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "layers.1.mlp.up_proj" not in key}, path)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*layers.1.mlp.up_proj"):
        PeftModel.from_pretrained(tiny(), folder)


def test_names_of_a_file_may_be_mapped(method: ModuleType, folder: Path):
    path = folder / "adapter_model.safetensors"
    values, part = load_file(path), next(iter(sorted(method.STORED))).partition(".")[0]
    save_file({key.replace(part, "called_otherwise"): value for key, value in values.items()}, path)
    again = PeftModel.from_pretrained(tiny(), folder, key_mapping={"called_otherwise": part})
    save_file(values, path)
    assert torch.equal(logits(again, method.IDS), logits(PeftModel.from_pretrained(tiny(), folder), method.IDS))


def test_no_difference_of_two_adapters_is_saved(method: ModuleType, folder: Path, tmp_path: Path):
    """PEFT's conversion of PiSSA and the like: it wrote a file that nothing loads in the place of what was trained."""
    model = method.random_adapter(tiny())
    with pytest.raises(ValueError, match=r"`path_initial_model_for_weight_conversion` is .*inside the rounding"):
        model.save_pretrained(tmp_path / "saved", True, None, "auto", True, str(folder))
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "saved", path_initial_model_for_weight_conversion=None)
