"""Blocks trained one by one, left behind as 8-bit layers with the weights' fraction, as the base of LR-QAT."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_lrqat import LowBitSRConfig, LRQATConfig, export, load_quantized, preprocess_blockwise, preprocess_gptq
from peft_lrqat.calibration.calibrate import BlockInputs
from peft_lrqat.checkpoint.inspect import inspect
from peft_lrqat.modules.packed import QuantizedLinear
from tests.memory import LiveBytes
from tests.mixtures import EXPERTS, FIRST, mixture
from tests.models import logits, tiny, tokens, train

IDS = tokens()
TEXT = [tokens(4, 32, seed=seed) for seed in range(2, 8)]
ASYMMETRIC = {"bits": 2, "group_size": 16, "symmetric": False}


def config(**options) -> LRQATConfig:
    settings = {"r": 4, "lora_alpha": 32, "group_size": -1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LRQATConfig(**{**settings, **options})


def trained(options: dict | None = None, model: nn.Module | None = None, calibration=TEXT, **settings) -> nn.Module:
    model = tiny(num_hidden_layers=1) if model is None else model
    options = options or {"bits": 3, "signed_scales": True}
    settings = {"epochs": 1, "batch": 8, **settings}
    return preprocess_blockwise(model, config(**options), calibration, progressbar=False, **settings)


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_buffers() if "weight_" in name}


def equal(one: nn.Module, other: nn.Module) -> bool:
    left, right = buffers(one), buffers(other)
    return bool(left) and left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("options", [{"bits": 3, "group_size": 0}, ASYMMETRIC, {"bits": 4, "downcast": "int"}], ids=str)
def test_start_train_save_and_reload(options: dict, tmp_path: Path):
    wanted = config(**options)
    model = trained(options, tiny(dtype=torch.bfloat16))
    model.save_pretrained(tmp_path / "base")
    peft_model = get_peft_model(model, wanted)
    layer = peft_model.base_model.model.model.layers[0].mlp.down_proj
    assert (layer.frozen.downcast, layer.frozen.grid) == (wanted.downcast, wanted.grid)
    start = logits(peft_model, IDS)
    open_options = dict.fromkeys(("bits", "group_size", "symmetric", "downcast"))
    loads = [load_quantized, AutoModelForCausalLM.from_pretrained][: 1 + wanted.symmetric]
    for load in loads:  # what config.json says decides what was left open
        again = get_peft_model(load(tmp_path / "base"), config(**open_options))
        assert torch.equal(logits(again, IDS), start)

    train(peft_model, IDS)
    after = logits(peft_model, IDS)
    peft_model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_quantized(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again, IDS), after)
    merged = peft_model.merge_and_unload()
    assert merged.config.peft_lrqat["bits"] == wanted.bits
    assert "fixed_point_bits" not in merged.config.peft_lrqat
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), IDS), after)


@pytest.mark.parametrize("options", [{"bits": 3}, ASYMMETRIC], ids=str)
def test_merged_at_once_it_is_what_downcast_int_leaves(options: dict):
    merged = get_peft_model(trained(options), config(**options)).merge_and_unload()
    integers = trained({**options, "downcast": "int"})
    assert equal(merged, integers)
    assert torch.equal(logits(merged, IDS), logits(integers, IDS))


@pytest.mark.parametrize("options", [{"bits": 3}, ASYMMETRIC], ids=str)
def test_unloading_gives_the_base_back(options: dict):
    model = trained(options)
    before = {name: value.clone() for name, value in buffers(model).items()}
    entry = dict(model.config.peft_lrqat)
    peft_model = get_peft_model(model, config(**options))
    start = logits(peft_model, IDS)
    back = peft_model.unload()
    assert buffers(back).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in buffers(back).items())
    assert back.config.peft_lrqat == entry
    rounded = get_peft_model(back, config(**options, downcast="int"))  # its integers, in less memory
    assert torch.equal(logits(rounded, IDS), start)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_outputs_are_nearer_to_the_float_model_than_those_of_gptq(family: str):
    text = torch.cat(TEXT)
    expected = logits(tiny(family), text)
    options = {"bits": 3, "signed_scales": False}  # signed ones bring GPTQ near in models as random as these
    model = trained({**options, "downcast": "int"}, tiny(family), epochs=4, batch=2)
    other = tiny(family)
    preprocess_gptq(other, config(**options), TEXT, progressbar=False)
    error, of_gptq = ((logits(m, text) - expected).pow(2).mean() for m in (model, other))
    assert error < 0.9 * of_gptq


def test_the_rest_of_the_model_stays_as_it_was():
    model = tiny().train()
    hidden = {name: value.clone() for name, value in model.named_parameters() if "proj" not in name}
    seen: list[type] = []
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, y: seen.append(type(module)))
    wanted = config(target_modules=["up_proj"], layers_to_transform=[1], layers_pattern="layers")
    preprocess_blockwise(model, wanted, TEXT, progressbar=False)
    assert model.training
    assert [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)] == [
        "model.layers.1.mlp.up_proj"
    ]
    assert all(torch.equal(value, hidden[name]) for name, value in model.named_parameters() if name in hidden)
    assert all(parameter.grad is None for parameter in model.parameters())
    seen.clear()
    logits(model, IDS)
    assert seen == [QuantizedLinear]


def test_forms_of_calibration_text_and_memory():
    words = torch.cat(TEXT)
    padding = {"input_ids": torch.randint(3, 90, (len(words), 3)), "attention_mask": torch.zeros(len(words), 3)}
    padded = {
        "input_ids": torch.cat([words, padding["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(words), padding["attention_mask"].long()], 1),
    }
    other = {**padded, "input_ids": torch.cat([words, padding["input_ids"].flip(0)], 1)}
    once = trained(calibration=[words])
    assert equal(once, trained(calibration=list(words.split(1))))
    assert equal(once, trained(calibration=words))
    assert equal(once, trained(calibration=[words], offload=True))
    assert not equal(once, trained(calibration=[words], seed=1))
    of_padded = trained(calibration=[padded])
    assert equal(of_padded, trained(calibration=[other]))  # what stands in the padding does not count
    assert not equal(of_padded, trained(calibration=[{"input_ids": padded["input_ids"]}]))


def test_it_takes_seven_copies_of_one_block_however_many_there_are():
    taken = []
    for blocks in (2, 3):
        model = tiny(num_hidden_layers=blocks, hidden_size=256, intermediate_size=704, dtype=torch.bfloat16)
        block = sum(p.numel() for p in model.model.layers[0].parameters())
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            trained({"bits": 4, "group_size": 32}, model, [part[:1, :8] for part in TEXT], epochs=2, batch=1)
        taken.append((live.peak - live.start) / (4 * block))
    assert taken[1] <= taken[0] + 0.02
    assert 5 < max(taken) < 7


def test_no_epoch_is_kept_that_made_the_held_out_text_worse():
    start = get_peft_model(tiny(num_hidden_layers=1), config(bits=3)).merge_and_unload()
    diverged = trained({"bits": 3, "downcast": "int"}, learning_rate=30.0, scale_learning_rate=1.0)
    assert equal(start, diverged)
    assert not equal(start, trained({"bits": 3, "downcast": "int"}))


@pytest.mark.parametrize("kind", ["Gemma3n", "Gemma4"])
def test_keys_and_values_for_later_blocks_are_those_of_the_own_stream(kind: str):
    if not hasattr(transformers.cache_utils, "KVSharingDict"):
        pytest.skip("this version of transformers hands keys and values on in another way")
    settings = {
        "vocab_size": 96, "vocab_size_per_layer_input": 96, "hidden_size": 32, "hidden_size_per_layer_input": 8,
        "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "num_kv_shared_layers": 2, "global_head_dim": 8, "sliding_window": 8,
        "max_position_embeddings": 64, "layer_types": ["sliding_attention", "full_attention"] * 2, "pad_token_id": 0,
    }  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}TextConfig")(**settings)).eval()
    blocks = model.model.layers
    with torch.no_grad():
        inputs = BlockInputs(model, blocks, [{"input_ids": IDS}])
        floats = inputs.fork()
        other = {"self_attn.k_proj.weight": torch.zeros_like(blocks[0].self_attn.k_proj.weight)}
        undisturbed = BlockInputs(model, blocks, [{"input_ids": IDS}])
        for index, block in enumerate(blocks):
            floats.advance(index, block)
            inputs.advance(index, block, other if index < 2 else None)
            undisturbed.advance(index, block)
    assert torch.equal(floats.hidden[0], undisturbed.hidden[0])
    assert not torch.equal(inputs.hidden[0], undisturbed.hidden[0])


def test_gradients_are_no_smaller_than_fp16_holds():
    model = tiny(num_hidden_layers=1)
    model.model.embed_tokens.weight.data *= 300  # a stream whose relative errors have small gradients
    found = [
        trained({"bits": 3, "downcast": "int"}, copy.deepcopy(model).to(dtype), batch=2).model.layers[0].mlp.down_proj
        for dtype in (torch.float16, torch.float32)
    ]
    assert (found[0].codes == found[1].codes).float().mean() > 0.99
    start = get_peft_model(model, config(bits=3)).merge_and_unload().model.layers[0].mlp.down_proj
    assert (found[0].codes == start.codes).float().mean() < 0.98


def test_inference_mode_does_not_matter():
    model = tiny(num_hidden_layers=1)
    with torch.inference_mode():
        trained(model=model)
    assert equal(model, trained())


def test_weights_that_are_not_finite():
    model = tiny(num_hidden_layers=1)
    model.model.norm.weight.data.fill_(torch.nan)  # after all blocks
    trained(model=model)
    model = tiny(num_hidden_layers=1)
    model.model.layers[0].input_layernorm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"outputs of block 0 .* are not finite"):
        trained(model=model)


def test_a_layer_that_no_token_reached():
    model = tiny(num_hidden_layers=1)
    model.model.layers[0].mlp.spare_proj = nn.Linear(32, 8)
    with pytest.raises(ValueError, match=r"No calibration token reached layer 'mlp.spare_proj' of block 0"):
        trained(model=model)
    wanted = config(bits=3, exclude_modules=["spare_proj"])
    preprocess_blockwise(model, wanted, TEXT, progressbar=False)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)


@pytest.mark.parametrize(
    ("options", "calibration", "settings", "match"),
    [
        ({}, [], {}, "`calibration` is empty"),
        ({}, ["some text"], {}, "give a `tokenizer`"),
        ({"target_modules": ["q_proj", "lm_head"]}, TEXT, {}, "not all inside one list of blocks"),
        ({"group_size": 5}, TEXT, {}, "does not divide"),
        ({"downcast": "fp16"}, TEXT, {}, "leaves 8-bit fixed point"),
        ({}, TEXT, {"epochs": 0}, "`epochs` is 0"),
        ({}, TEXT, {"batch": 0}, "`batch` is 0"),
        ({}, TEXT, {"held_out": 1.0}, "`held_out` is 1.0"),
        ({}, TEXT, {"learning_rate": -1.0}, "`learning_rate` is -1.0"),
        ({}, TEXT, {"learning_rate": "0.01"}, "`learning_rate` is '0.01'"),
        ({}, TEXT, {"seed": "x"}, "`seed` is 'x'"),
        ({}, TEXT, {"offload": "cpu"}, "`offload` is 'cpu'; allowed are True, False"),
        ({"act_bits": 8}, TEXT, {}, "`act_bits` is 8"),
    ],
)
def test_what_is_refused_changes_nothing(options: dict, calibration: list, settings: dict, match: str):
    model = tiny()
    before = logits(model, IDS)
    with pytest.raises(ValueError, match=match):
        preprocess_blockwise(model, config(**options), calibration, progressbar=False, **settings)
    assert torch.equal(logits(model, IDS), before)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 4}, "asks for bits=4, but the base model is quantized for bits=3"),
        ({"group_size": 16}, "asks for group_size=16, but the base model is quantized for group_size=-1"),
        ({"downcast": "bf16"}, "`downcast` is 'bf16', but the base model holds 8-bit fixed-point numbers"),
    ],
)
def test_a_base_is_for_the_grid_that_it_was_trained_for(options: dict, match: str):
    model = trained({"bits": 3})
    with pytest.raises(ValueError, match=match):
        get_peft_model(model, config(**{"bits": 3, **options}))
    assert all(isinstance(m, QuantizedLinear) for n, m in model.named_modules() if n.endswith("proj"))


def test_at_eight_bits_the_base_is_an_ordinary_one():
    model = trained({"bits": 3})
    served = logits(model, IDS)
    wide = get_peft_model(model, config(bits=8))
    assert torch.equal(logits(wide, IDS), served)


def test_a_base_that_was_loaded_as_floats_is_refused(tmp_path: Path):
    trained(ASYMMETRIC).save_pretrained(tmp_path)
    floats = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"loaded as floats.* `peft_lrqat.load_quantized"):
        get_peft_model(floats, config(**ASYMMETRIC))


@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 1.58}, {"bits": 4, "forward_bits": 1.58}], ids=str)
def test_low_bit_sr_starts_from_the_integers(options: dict, tmp_path: Path):
    wanted = LowBitSRConfig(target_modules="all-linear", **options)
    for preprocess in (preprocess_blockwise, preprocess_gptq):
        model = tiny(num_hidden_layers=1)
        preprocess(model, wanted, TEXT, progressbar=False)
        start = logits(model, IDS)
        model.save_pretrained(tmp_path)
        for base in (model, load_quantized(tmp_path)):
            peft_model = get_peft_model(base, wanted)
            with peft_model.disable_adapter():
                assert torch.equal(logits(peft_model, IDS), start)
            if "forward_bits" not in options:
                assert torch.equal(logits(peft_model, IDS), start)


SQUARE = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "torchao"])
def test_an_exported_base_is_the_same_start(format: str, tmp_path: Path):
    model = trained({"bits": 3, "group_size": 16}, tiny(**SQUARE))
    model.save_pretrained(tmp_path / "base")
    peft_model = get_peft_model(load_quantized(tmp_path / "base"), config(bits=3, group_size=16))
    start = logits(peft_model, IDS)
    open_options = dict.fromkeys(("bits", "group_size", "symmetric", "downcast"))
    for index, source in enumerate((model, tmp_path / "base")):
        export(source, tmp_path / str(index), format, progress=False)
        again = get_peft_model(load_quantized(tmp_path / str(index)), config(**open_options))
        assert (again.peft_config["default"].bits, again.peft_config["default"].downcast) == (3, "fx8")
        assert torch.equal(logits(again, IDS), start)
    export(peft_model, tmp_path / "trained", format, progress=False)
    assert load_quantized(tmp_path / "trained").config.peft_lrqat.get("fixed_point_bits") is None


def test_low_bit_sr_starts_from_fixed_point_too():
    rounded = logits(trained({"bits": 3, "downcast": "int"}), IDS)
    peft_model = get_peft_model(trained({"bits": 3}), LowBitSRConfig(bits=3, target_modules="all-linear"))
    assert torch.equal(logits(peft_model, IDS), rounded)


def test_quantized_models_are_refused():
    with pytest.raises(ValueError, match="quantized already"):
        trained(model=trained())
    with pytest.raises(ValueError, match=r"Conv1D; block-wise training here is for nn.Linear"):
        trained(model=tiny("gpt2"))


def of_mixture(options: dict, model: nn.Module | None = None, **settings) -> nn.Module:
    return trained({"target_modules": ["experts"], **options}, model or mixture(num_hidden_layers=1), **settings)


@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 2, "group_size": 8, "symmetric": False}], ids=str)
def test_experts(options: dict, tmp_path: Path):
    wanted, text = config(target_modules=["experts"], **options), torch.cat(TEXT)
    settings = {"epochs": 4, "batch": 4}
    peft_model = get_peft_model(of_mixture(options, **settings), wanted)
    rounded = get_peft_model(mixture(num_hidden_layers=1), wanted)
    expected = logits(mixture(num_hidden_layers=1), text)
    error, of_rounding = ((logits(m, text) - expected).pow(2).mean() for m in (peft_model, rounded))
    assert error < 0.9 * of_rounding
    start = logits(peft_model, IDS)
    base = peft_model.unload()
    assert all(isinstance(base.get_submodule(f"{FIRST}.{e}.up_proj"), QuantizedLinear) for e in range(EXPERTS))
    base.save_pretrained(tmp_path)
    opens = inspect(tmp_path).engines[-1]
    assert opens.name == "peft_lrqat.load_quantized"
    assert f"LR-QAT starts from it with bits={options['bits']}" in opens.why
    assert "transformers alone makes floats of the experts" in opens.why
    open_options = dict.fromkeys(("bits", "group_size", "symmetric", "downcast"))
    again = get_peft_model(load_quantized(tmp_path), config(**{**open_options, "target_modules": ["experts"]}))
    assert torch.equal(logits(again, IDS), start)
    merged = again.merge_and_unload()
    assert torch.equal(logits(merged, IDS), start)
    assert equal(merged, of_mixture({**options, "downcast": "int"}, **settings))


def test_experts_in_a_folder_and_in_a_run_that_goes_on(tmp_path: Path):
    mixture().save_pretrained(tmp_path / "float")

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "float")

    expected = of_mixture({"bits": 3}, load())
    assert equal(of_mixture({"bits": 3}, tmp_path / "float", resume_from=tmp_path / "blocks"), expected)
    assert equal(of_mixture({"bits": 3}, load(), resume_from=tmp_path / "blocks"), expected)
    other = load()
    other.get_parameter(f"{FIRST}.down_proj").data[2, 3, 4] += 1
    with pytest.raises(ValueError, match="holds blocks of another run"):
        of_mixture({"bits": 3}, other, resume_from=tmp_path / "blocks")


def test_an_expert_that_no_token_reached_is_rounded():
    model = mixture(num_hidden_layers=1)
    gate = model.model.layers[0].mlp.gate.weight.data
    gate[:] = gate[0] * torch.tensor([1, -1, 2, -2, 0.5]).unsqueeze(1)  # of the last others are always ahead
    rounded = get_peft_model(copy.deepcopy(model), config(bits=3, target_modules=["experts"])).merge_and_unload()
    with pytest.warns(UserWarning, match=r"reached 1 of the experts of block 0 \(4\)"):
        of_mixture({"bits": 3, "downcast": "int"}, model, epochs=2, batch=2)
    pairs = zip(_down_projections(model), _down_projections(rounded), strict=True)
    *others, last = (torch.equal(one.codes, two.codes) for one, two in pairs)
    assert last
    assert not any(others)


def _down_projections(model: nn.Module) -> list:
    return [model.get_submodule(f"{FIRST}.{e}.down_proj") for e in range(EXPERTS)]


def test_experts_are_as_they_were_after_an_error():
    model = mixture()
    model.model.layers[0].input_layernorm.weight.data[0] = torch.nan
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"outputs of block 0 .* are not finite"):
        of_mixture({"bits": 3}, model)
    assert [type(module) for module in model.modules()] == kinds


def test_low_bit_sr_leaves_experts_float():
    model = mixture(num_hidden_layers=1)
    wanted = LowBitSRConfig(bits=3, group_size=8, target_modules="all-linear")
    with pytest.warns(UserWarning, match="stay as they are"):
        preprocess_blockwise(model, wanted, TEXT, progressbar=False, epochs=1, batch=8)
    assert model.get_parameter(f"{FIRST}.down_proj").ndim == 3
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantizedLinear)
