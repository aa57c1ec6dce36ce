"""Rank 0: no low-rank factors. The integers stay what they are, and the scales alone are trained."""

from __future__ import annotations

import contextlib
import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from peft_lrqat import (
    Distillation,
    LRQATConfig,
    calibrate_activations,
    create_lrqat_optimizer,
    load_quantized,
    preprocess_blockwise,
)
from peft_lrqat.ops import use_kernels
from peft_lrqat.tuners.lrqat.experts import LRQATExpertLinear
from tests.lrqat import ATTENTION, GRID, IDS, codes_of, layers
from tests.mixtures import mixture, on_experts
from tests.models import adapted, logits, tiny, train
from tests.problems import DEVICE, assert_close
from tests.quantized_files import Spec, write
from tests.refusals import check_no_factor, refused

OPTIONS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "group_size": 8},
    "3 bits per channel": {"bits": 3},
    "2 bits with zero points": {"bits": 2, "group_size": 8, "symmetric": False},
    "one scale": {"bits": 8, "group_size": 0},
    "scales by channel": {"bits": 4, "group_size": 8, "learn_scales": "channel"},
    "fx8": {"bits": 4, "group_size": 8, "downcast": "fx8"},
    "bf16": {"bits": 4, "downcast": "bf16"},
    "rounded inputs": {"bits": 4, "act_bits": 8},
    "fixed scales of inputs": {"bits": 4, "act_bits": 8, "act_scale": "static"},
    "those alone": {"bits": 4, "act_bits": 8, "act_scale": "static", "learn_scales": False},
    "rounded cache": {"bits": 4, "kv_bits": 8},
}


def rank_0(model: PreTrainedModel | None = None, **options: Any) -> PeftModel:
    return adapted(model or tiny(), **{**GRID, "r": 0, **options})


def moved(**options: Any) -> PeftModel:
    """With scales that are not those of the base."""
    return rank_0(init_lora_weights=False, **options).eval()


def two() -> PeftModel:
    """ "default" has rank 0 and "other" factors, in some of the layers."""
    model = moved()
    options = {**GRID, "r": 2, "downcast": "int", "target_modules": ATTENTION, "init_lora_weights": False}
    model.add_adapter("other", LRQATConfig(**options))
    return model.eval()


@pytest.mark.parametrize("name", OPTIONS)
def test_trained_saved_loaded_and_merged(name: str, tmp_path: Path):
    options = {"group_size": -1, **OPTIONS[name]}
    model = rank_0(**options)
    if "act_scale" in options:
        calibrate_activations(model, [IDS])
    before = {key: codes_of(layer) for key, layer in layers(model).items()}
    start = logits(model, IDS)
    train(model, IDS, lr=2e-2)
    assert all(torch.equal(codes_of(layer, "default"), before[key]) for key, layer in layers(model).items())
    seen = logits(model, IDS)

    model.save_pretrained(tmp_path / "adapter")
    kinds = {key.split(".")[-2] for key in load_file(tmp_path / "adapter/adapter_model.safetensors") if "layers" in key}
    learned = {"lora_scale_shift"} if options.get("learn_scales", True) else set()
    assert kinds == learned | ({"lora_act_scale"} if "act_scale" in options else set())
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, IDS), seen)

    model.merge_adapter()
    assert torch.equal(logits(model, IDS), seen)
    model.unmerge_adapter()
    assert torch.equal(logits(model, IDS), seen)
    assert not torch.equal(seen, start)
    if "act_scale" not in options:  # which belong to an adapter
        with model.disable_adapter():
            assert torch.equal(logits(model, IDS), start)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, IDS), seen)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), IDS), seen)


def test_it_is_rank_1_with_factors_that_are_never_trained():
    """Bit for bit, as long as the base is kept alike."""
    results = []
    for options in ({"r": 0}, {"r": 1, "downcast": "int"}):
        model = adapted(tiny(), bits=4, group_size=8, **options)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("lora_scale_shift" in key)
        results.append(
            (train(model, IDS), [layer._scale(layer._operands(["default"]).shift) for layer in layers(model).values()])
        )
    assert results[0][0] == results[1][0]
    assert all(torch.equal(mine, other) for mine, other in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("name", ["4 bits", "scales by channel", "rounded inputs", "fixed scales of inputs"])
def test_kernels_compute_what_the_references_do(name: str):
    pytest.importorskip("triton", reason="the kernels need Triton")
    model = moved(**{"group_size": -1, **OPTIONS[name]})
    if "act_scale" in OPTIONS[name]:
        calibrate_activations(model, [IDS])
    layer, found = next(iter(layers(model.to(DEVICE)).values())), []
    x = torch.randn(2, 5, layer.in_features, device=DEVICE, requires_grad=True)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for kernels in (False, True):
        with use_kernels(kernels):
            y = layer(x)
            found.append((y, *torch.autograd.grad(y.square().sum(), trained)))
    for mine, other in zip(*found, strict=True):
        assert_close(mine, other)


def test_what_is_counted_and_kept(capsys: pytest.CaptureFixture):
    model = rank_0()
    scales = sum(layer.frozen.scale0.numel() for layer in layers(model).values())
    assert model.get_nb_trainable_parameters()[0] == scales
    assert {layer.frozen.downcast for layer in layers(model).values()} == {"int"}
    layer, kept = next(iter(layers(model).values())), []
    x = torch.randn(3, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    large = [t for t in kept if t.is_floating_point() and t.numel() >= layer.in_features * layer.out_features]
    assert kept
    assert not large
    assert layer.get_delta_weight("default").shape == (layer.out_features, layer.in_features)
    assert not layer.get_delta_weight("default").any()


@pytest.mark.parametrize(
    ("options", "of_q", "of_others"),
    [
        ({"r": 0, "rank_pattern": {"q_proj": 3}}, 3, 0),
        ({"r": 0, "rank_pattern": {"q_proj": 3}, "use_rslora": True}, 3, 0),
        ({"r": 0, "rank_pattern": {"q_proj": 3}, "learn_scales": False}, 3, 0),
        ({"r": 3, "rank_pattern": {"q_proj": 0}}, 0, 3),
        ({"r": 3, "rank_pattern": {"q_proj": 0}, "learn_scales": False, "init_lora_weights": "loftq"}, 0, 3),
        ({"r": 3, "rank_pattern": {".*_proj": 0}}, 0, 0),
    ],
)
def test_some_layers_have_factors(options: dict[str, Any], of_q: int, of_others: int, tmp_path: Path):
    model = rank_0(lora_alpha=None, downcast="int", **options)
    for layer in layers(model).values():
        rank = of_q if "q_proj" in layer.name else of_others
        assert layer.r["default"] == rank
        assert ("default" in layer.lora_B) == bool(rank)
        assert layer.scaling["default"] == pytest.approx(16 if rank else 1)
    start = logits(model, IDS)
    train(model, IDS, lr=0.2)
    found = logits(model, IDS)
    assert not torch.equal(found, start)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path), IDS), found)
    assert torch.equal(logits(model.merge_and_unload(), IDS), found)


def test_a_rank_that_is_set_afterwards_gives_its_own_strength():
    config = LRQATConfig(r=0, rank_pattern={"q_proj": 0, "k_proj": 2})
    assert config.alpha_pattern == {"k_proj": 32}
    config.r = 8
    config.check_options()
    assert config.lora_alpha == 128


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"learn_scales": False}, "`r` is 0 with `learn_scales=False`, which leaves nothing to train"),
        ({"learn_scales": False, "rank_pattern": {"q_proj": 0}}, "leaves nothing to train"),
        ({"learn_scales": False, "act_bits": 8}, "leaves nothing to train"),
        ({"init_lora_weights": "loftq"}, "`init_lora_weights` is 'loftq' with `r=0`"),
    ],
)
def test_refused(options: dict, match: str):
    with pytest.raises(ValueError, match=match):
        LRQATConfig(**{"r": 0, **options})


# -- other modules


@pytest.mark.parametrize("model", ["gpt2", "embedding"])
def test_other_kinds_of_layers(model: str, tmp_path: Path):
    def base() -> PreTrainedModel:
        return tiny("gpt2" if model == "gpt2" else "llama")

    options = {"target_modules": ["embed_tokens", "q_proj"]} if model == "embedding" else {}
    trained = rank_0(base(), **options)
    losses = train(trained, IDS)
    assert losses[-1] < losses[0]
    seen = logits(trained, IDS)
    assert not any(layer.get_delta_weight("default").any() for layer in layers(trained).values())
    for layer in layers(trained).values():
        assert layer.get_delta_weight("default").shape == layer.weight.shape
    trained.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path), IDS), seen)
    assert torch.equal(logits(trained.merge_and_unload(), IDS), seen)


@pytest.mark.parametrize("learn_scales", [True, "channel"])
def test_experts(learn_scales: Any, tmp_path: Path):
    model = on_experts(mixture(), r=0, learn_scales=learn_scales)
    stacks = [layer for layer in model.modules() if isinstance(layer, LRQATExpertLinear)]
    assert stacks
    losses = train(model, IDS)
    assert losses[-1] < losses[0]
    seen = logits(model, IDS)
    for stack in stacks:
        delta = stack.get_delta_weight("default")
        assert delta.shape == (stack.experts, stack.out_features, stack.in_features)
        assert not delta.any()
    model.add_weighted_adapter(["default"], [1.0], "same", combination_type="linear")
    model.set_adapter("same")
    assert torch.equal(logits(model, IDS), seen)
    model.set_adapter("default")
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert torch.equal(logits(PeftModel.from_pretrained(mixture(), tmp_path), IDS), seen)
    assert torch.equal(logits(model.merge_and_unload(), IDS), seen)


@pytest.mark.parametrize("spec", [Spec("gptq"), Spec("awq", symmetric=False), Spec("packed")], ids=str)
def test_a_base_that_others_quantized(spec: Spec, tmp_path: Path):
    write(tmp_path / "base", spec)
    model = get_peft_model(load_quantized(tmp_path / "base"), LRQATConfig(r=0, task_type="CAUSAL_LM"))
    losses = train(model, IDS)
    assert losses[-1] < losses[0]
    seen = logits(model, IDS)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_quantized(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, IDS), seen)
    assert torch.equal(logits(model.merge_and_unload(), IDS), seen)


def test_a_model_that_is_quantized_while_it_is_loaded(tmp_path: Path):
    tiny().save_pretrained(tmp_path)
    config = LRQATConfig(**GRID, r=0, task_type="CAUSAL_LM")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config.for_loading())
    models = [get_peft_model(model, config) for model in (loaded, tiny())]
    assert train(models[0], IDS) == train(models[1], IDS)


# -- several adapters


def test_beside_factors_they_add_up_inside_the_rounding():
    model = two()
    for layer in layers(model).values():
        shift, A, B, _ = layer._operands(["default", "other"])
        own = [layer.lora_scale_shift[name].weight for name in ("default", "other") if name in layer.lora_scale_shift]
        assert torch.equal(shift, torch.stack([part.detach() for part in own]).sum(0))
        assert (A is None) == (B is None) == ("other" not in layer.lora_B)
        assert layer.moves_integers(["default"]) is False
    model.base_model.set_adapter(["default", "other"])
    seen = logits(model, IDS)
    for names in (["default"], ["other"]):
        model.base_model.set_adapter(names)
        assert not torch.equal(logits(model, IDS), seen)
    assert torch.equal(logits(model.merge_and_unload(adapter_names=["default", "other"]), IDS), seen)


def test_an_adapter_whose_base_would_have_fractions_is_told_how_this_one_is_kept():
    model, config = rank_0(), LRQATConfig(**GRID, r=2)
    with refused(model, "downcast='fx8' and adapter 'default' has downcast='int'. Make it with that", config=config):
        model.add_adapter("other", config)
    config.downcast = "int"
    model.add_adapter("other", config)


def test_switched_while_weights_are_kept(nothing_stays: None):
    """Rank 0, rank 2 and both, in mixed batches and one after the other: what is kept is never another's."""
    model, names = two(), ["default", "__base__", "other", "default"]
    model.add_adapter("third", copy.deepcopy(model.peft_config["default"]))
    names[3] = "third"
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    mixed = model.generate(input_ids=IDS, adapter_names=names, **options)
    for row, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            if name != "__base__":
                model.set_adapter(name)
            assert torch.equal(model.generate(input_ids=IDS[row : row + 1], **options)[0], mixed[row])


def test_one_is_deleted():
    model = moved()
    seen = logits(model, IDS)
    model.add_adapter("other", LRQATConfig(**GRID, r=0, init_lora_weights=False))
    model.set_adapter("other")
    other = logits(model, IDS)
    model.delete_adapter("default")
    assert not torch.equal(other, seen)
    assert torch.equal(logits(model, IDS), other)
    for layer in layers(model).values():
        parts = (layer.lora_A, layer.lora_scale_shift, layer.r, layer.scaling, layer.adapter_options)
        assert all(list(part) == ["other"] for part in parts)


def test_weighted_adapters_are_their_scales():
    model = moved()
    model.add_adapter("other", LRQATConfig(**GRID, r=0, target_modules=ATTENTION, init_lora_weights=False))
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both")
    assert model.peft_config["both"].r == 0
    for layer in layers(model).values():
        shift = layer.lora_scale_shift
        expected = 0.5 * shift["default"].weight
        if "other" in shift:
            expected = expected + 2 * shift["other"].weight
        assert torch.equal(shift["both"].weight, expected)
        assert not shift["both"].weight.requires_grad
    model.set_adapter("both")
    seen = logits(model, IDS)
    assert torch.equal(logits(model.merge_and_unload(), IDS), seen)


@pytest.mark.parametrize(
    ("weights", "kind", "match"),
    [([1.0, 1.0], "median", "Invalid combination"), ([1.0], "svd", "`weights` has 1 numbers for 2 adapters")],
)
def test_a_combination_that_there_is_not_adds_no_adapter(weights: list[float], kind: str, match: str):
    model = moved()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    with refused(model, match):
        model.add_weighted_adapter(["default", "other"], weights, "mix", kind)
    assert "mix" not in model.peft_config


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_weighted_adapters_all_have_factors_or_none(combination: str):
    model = two()
    with refused(model, "combines low-rank factors layer by layer, but adapters of rank 0 have none"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type=combination)
    assert "both" not in model.peft_config


def test_a_factor_on_an_adapter_without_factors_is_refused():
    model = moved()
    seen, layer = logits(model, IDS), next(iter(layers(model).values()))
    check_no_factor(model, layer, r"rank 0, so there are no low-rank factors .*add_weighted_adapter")
    with rescale_adapter_scale(model, 1):
        assert torch.equal(logits(copy.deepcopy(model), IDS), seen)


def test_a_factor_is_on_the_layers_that_have_factors():
    model = moved(r=2, rank_pattern={"q_proj": 0})
    seen = logits(model, IDS)
    with rescale_adapter_scale(model, 0.5):
        half = logits(model, IDS)
        assert torch.equal(logits(copy.deepcopy(model).merge_and_unload(), IDS), half)
    assert not torch.equal(half, seen)
    assert torch.equal(logits(model, IDS), seen)


# -- files


@pytest.mark.parametrize(("saved", "there"), [(2, 0), (0, 2)])
def test_a_file_of_another_rank(saved: int, there: int, tmp_path: Path):
    """Factors that have no place are no part to leave out without a word, nor are factors that are lacking."""
    rank_0(r=saved, downcast="int").save_pretrained(tmp_path)
    tensors, model = load_file(tmp_path / "adapter_model.safetensors"), rank_0(r=there, downcast="int")
    with refused(model, f"The adapter file {'has' if saved else 'lacks'} 'lora_A' for module .* a rank of 0"):
        set_peft_model_state_dict(model, tensors)


def test_a_layer_without_factors_by_its_whole_name(tmp_path: Path):
    model = moved(r=2, rank_pattern={"^model.layers.0.self_attn.q_proj": 0})
    assert len([layer for layer in layers(model).values() if not layer.r["default"]]) == 1
    model.save_pretrained(tmp_path)
    seen, other = logits(model, IDS), moved(r=2, rank_pattern={"^model.layers.0.self_attn.q_proj": 0})
    set_peft_model_state_dict(other, load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(other, IDS), seen)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path), IDS), seen)


# -- training


@pytest.mark.parametrize("rate", [1e-7, 1e-3])
def test_no_learning_rate_is_too_low_for_integers(rate: float, tmp_path: Path, capsys: pytest.CaptureFixture):
    from peft_lrqat import QuantizationCallback

    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, learning_rate=rate, report_to=[], disable_tqdm=True
    )
    trainer = Trainer(rank_0(), arguments, train_dataset=rows, callbacks=[QuantizationCallback(plot=False)])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*learning rate of LR-QAT's adapters.*")
        trainer.train()
    said = capsys.readouterr().out
    assert "scales changed by" in said
    assert "of the integers have changed" not in said


def test_the_optimizer_of_scales():
    model = rank_0()
    (group,) = create_lrqat_optimizer(model, lr=1e-3, scale_lr=1e-4, weight_decay=0.1).param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-4, 0.0)
    assert sum(p.numel() for p in group["params"]) == model.get_nb_trainable_parameters()[0]


def test_compiled_it_is_the_same():
    layer = next(iter(layers(moved()).values()))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    torch._dynamo.reset()
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = run(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, layer.lora_scale_shift["default"].weight])))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "at rank 0: the integers stay, the scales are trained"),
        (OPTIONS["those alone"], "the scales of inputs are trained"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 0, lora_alpha 16"),
    ],
)
def test_the_card_says_what_was_trained(options: dict[str, Any], says: str):
    assert says in LRQATConfig(r=0, **options).recipe()


def test_a_reference_of_a_trained_adapter():
    """As TRL makes one for DPO: an adapter of the same configuration, and a copy by names."""
    model = rank_0()
    train(model, IDS)
    seen = logits(model, IDS)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    train(model, IDS, steps=1)
    assert not torch.equal(logits(model, IDS), seen)
    model.set_adapter("ref")
    assert torch.equal(logits(model.eval(), IDS), seen)


def test_the_best_recipe(tmp_path: Path):
    """Block by block, then the scales, with the float model as teacher."""
    config = LRQATConfig(bits=3, group_size=8, downcast="int", r=0, task_type="CAUSAL_LM")
    model, teacher = tiny(), tiny()
    preprocess_blockwise(model, config, [row[None] for row in IDS], epochs=1, progressbar=False)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=1, learning_rate=1e-2, report_to=[], disable_tqdm=True
    )
    adapted_model = get_peft_model(model, config)
    before = [codes_of(layer).cpu() for layer in layers(adapted_model).values()]  # the trainer moves the model
    trainer = Trainer(adapted_model, arguments, train_dataset=rows, callbacks=[Distillation(teacher)])
    trainer.train()
    divergence = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergence[-1] < divergence[0]
    assert all(map(torch.equal, before, [codes_of(layer).cpu() for layer in layers(adapted_model).values()]))
    seen = logits(adapted_model.eval(), IDS)
    assert torch.equal(logits(adapted_model.merge_and_unload(), IDS), seen)
