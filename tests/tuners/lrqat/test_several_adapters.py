"""Several adapters, and what merging does beyond common/test_layer.py."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from peft_lrqat import LRQATConfig
from tests.lrqat import ATTENTION, GRID, IDS, codes_of, layers, other, random_adapter
from tests.models import adapted, logits, tiny, train
from tests.refusals import refused

# -- several adapters


def test_adapters_are_independent_and_add_up_inside_the_rounding(base: PreTrainedModel):
    model = random_adapter(base)
    one = logits(model, IDS)
    model.add_adapter("second", LRQATConfig(**GRID, r=2, target_modules=ATTENTION, init_lora_weights=False))
    assert torch.equal(logits(model, IDS), one)
    model.set_adapter("second")
    two = logits(model, IDS)
    assert not torch.equal(two, one)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        name for name, p in model.named_parameters() if "second" in name
    ]
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, IDS)
    layer = next(layer for name, layer in layers(model).items() if "q_proj" in name)
    summed = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    phi = layer.get_base_layer().weight / layer.frozen.scale0.repeat_interleave(8, dim=1)
    expected = (phi + summed).clamp(-8, 7)
    # fx8 keeps the middle of a cell of 1/16, so entries nearer than that to a tie may fall either way
    clear = ((expected - expected.floor()) - 0.5).abs() > 1 / 16
    found = codes_of(layer, "default", "second").float()
    assert torch.equal(found[clear], expected.round().clamp(-8, 7)[clear])

    model.delete_adapter("second")
    assert "second" not in "".join(model.state_dict())
    assert "second" not in model.peft_config
    model.set_adapter("default")
    assert torch.equal(logits(model, IDS), one)
    model.add_adapter("second", LRQATConfig(**GRID, r=2, target_modules=ATTENTION, init_lora_weights=False))
    assert not torch.equal(both, one)


COMBINATIONS = ["linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd"]
COMBINATIONS += ["dare_ties_svd", "magnitude_prune", "magnitude_prune_svd"]


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_weighted_adapters_combine_scale_shifts_linearly(base: PreTrainedModel, kind: str):
    model = random_adapter(base, target_modules=["q_proj"], r=3)
    model.add_adapter(
        "other", LRQATConfig(**GRID, r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False)
    )
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_scale_shift["default"].weight.fill_(0.25)
            layer.lora_scale_shift["other"].weight.fill_(-0.5)
    density = {} if kind in ("linear", "cat", "svd") else {"density": 0.7}
    model.add_weighted_adapter(["default", "other"], [2.0, 0.5], "mix", combination_type=kind, **density)
    for layer in layers(model).values():
        shift = layer.lora_scale_shift["mix"].weight
        assert torch.equal(shift, torch.full_like(shift, 0.25))
        if kind in ("cat", "svd"):
            wanted = 2 * layer.get_delta_weight("default") + 0.5 * layer.get_delta_weight("other")
            rank = 6 if kind == "cat" else 3
            assert layer.r["mix"] == rank
            if kind == "cat":
                torch.testing.assert_close(layer.get_delta_weight("mix"), wanted, rtol=1e-4, atol=1e-4)
    model.set_adapter("mix")
    assert logits(model, IDS).isfinite().all()


def test_weighted_adapters_may_have_different_targets(base: PreTrainedModel):
    model = random_adapter(base, target_modules=["q_proj"])
    model.add_adapter("other", LRQATConfig(**GRID, r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "mix", combination_type="cat")
    for layer in layers(model).values():
        (own,) = {"default", "other"} & set(layer.lora_A)
        torch.testing.assert_close(layer.get_delta_weight("mix"), layer.get_delta_weight(own))


def test_a_combination_that_fails_adds_no_adapter(base: PreTrainedModel):
    model = random_adapter(base, target_modules=["q_proj"])
    model.add_adapter("other", LRQATConfig(**GRID, r=2, target_modules=["q_proj"], init_lora_weights=False))
    for wrong in ({"combination_type": "linear"}, {"combination_type": "ties_svd", "density": "half"}):
        with refused(model, "", Exception):  # different ranks; a density that is no number
            model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "mix", **wrong)
        assert list(model.peft_config) == ["default", "other"]


def test_a_combination_does_not_take_a_name_that_there_is(base: PreTrainedModel):
    """PEFT returns at once, so that other weights, tried under the same name, would be those of the first try."""
    model = random_adapter(base, target_modules=["q_proj"])
    model.add_weighted_adapter(["default"], [1.0], "mix")
    with pytest.raises(ValueError, match=r"There is an adapter 'mix' already.*`model\.delete_adapter\('mix'\)` first"):
        model.add_weighted_adapter(["default"], [0.5], "mix")
    model.delete_adapter("mix")
    model.add_weighted_adapter(["default"], [0.5], "mix")
    assert list(model.peft_config) == ["default", "mix"]


def test_adapters_add_up_in_inference_mode(two_adapters: PeftModel):
    two_adapters.base_model.set_adapter(["default", "other"])
    expected = logits(two_adapters, IDS)
    with torch.inference_mode():
        assert torch.equal(two_adapters(input_ids=IDS).logits, expected)


def test_a_model_may_be_adapted_in_inference_mode(base: PreTrainedModel):
    expected = logits(adapted(copy.deepcopy(base), **GRID), IDS)
    with torch.inference_mode():
        model = adapted(base, **GRID)
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert torch.equal(logits(model, IDS), expected)


# -- merging


def test_merging_one_after_the_other_is_merging_together(base: PreTrainedModel):
    model = random_adapter(base)
    model.add_adapter("other", LRQATConfig(**GRID, r=2, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    together = logits(model, IDS)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert torch.equal(logits(model, IDS), together)
    model.unmerge_adapter()
    assert torch.equal(logits(model, IDS), together)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_scale_shift"])
def test_safe_merge_refuses_values_that_are_not_finite(base: PreTrainedModel, part: str):
    model = random_adapter(base)
    layer = next(iter(layers(model).values()))
    holder = getattr(layer, part)["default"]
    (holder if isinstance(holder, nn.Parameter) else holder.weight).data.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert not layer.merged
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


# -- mixed batches


def test_mixed_batches_generate_with_beams(two_adapters: PeftModel):
    names = ["other", "__base__", "default", "other"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "do_sample": False}
    mixed = two_adapters.generate(input_ids=IDS, adapter_names=names, **options)
    for row, name in enumerate(names):
        if name == "__base__":
            with two_adapters.disable_adapter():
                alone = two_adapters.generate(input_ids=IDS[row : row + 1], **options)
        else:
            two_adapters.set_adapter(name)
            alone = two_adapters.generate(input_ids=IDS[row : row + 1], **options)
        assert torch.equal(mixed[row], alone[0])


# -- scales by channel


def by_channel(model: PreTrainedModel, **options) -> PeftModel:
    return random_adapter(model, learn_scales="channel", **options)


def test_by_channel_without_groups_is_what_one_scale_a_channel_is(base: PreTrainedModel):
    for size in (-1, 0):
        results = []
        for learn_scales in (True, "channel"):
            torch.manual_seed(0)
            model = random_adapter(copy.deepcopy(base), learn_scales=learn_scales, group_size=size)
            losses = train(model, IDS)
            results.append((losses, logits(model, IDS), logits(model.merge_and_unload(), IDS)))
        assert results[0][0] == results[1][0]
        for a, b in zip(results[0][1:], results[1][1:], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("symmetric", [True, False])
def test_by_channel_merged_is_trained(base: PreTrainedModel, symmetric: bool):
    model = by_channel(base, symmetric=symmetric, signed_scales=symmetric, bits=3)
    before = {name: layer._scale(None) for name, layer in layers(model).items()}
    train(model, IDS)
    for name, layer in layers(model).items():
        shift = layer.lora_scale_shift["default"].weight
        assert shift.shape == (layer.out_features, 1)
        assert shift.any()
        factor = layer.grid_tensor().scale / before[name]
        assert (factor / (1 + shift) - 1).abs().max() <= 2**-8  # of the smallest of a group, as it is stored
    assert "(over r, in steps of the row's largest scale)" in model.peft_config["default"].recipe()
    trained = logits(model, IDS)
    model.merge_adapter()
    assert torch.equal(logits(model, IDS), trained)
    model.unmerge_adapter()
    assert torch.equal(logits(model, IDS), trained)
    assert torch.equal(logits(model.merge_and_unload(), IDS), trained)


def test_by_channel_scales_that_left_their_range_are_counted(base: PreTrainedModel):
    model = by_channel(base)
    layer = next(iter(layers(model).values()))
    with torch.no_grad():
        layer.lora_scale_shift["default"].weight[2] = -1.5
    assert int(layer.scales_lost()) == layer.in_features // GRID["group_size"]
    with pytest.raises(ValueError, match=r"scales of .* have left what"):
        model.merge_adapter()


def test_by_channel_adapters_add_up_in_one_unit(base: PreTrainedModel):
    model = by_channel(base)
    first = {name: layer.get_delta_weight("default") for name, layer in layers(model).items()}
    model.add_adapter("other", other(learn_scales="channel"))
    model.add_weighted_adapter(["default", "other"], [1.0, 0.0], "mix", combination_type="cat")
    assert model.peft_config["mix"].learn_scales == "channel"
    for name, layer in layers(model).items():
        torch.testing.assert_close(layer.get_delta_weight("mix"), first[name])
    one = logits(model, IDS)
    model.base_model.set_adapter(["default", "other"])
    assert not torch.equal(logits(model, IDS), one)
    summed = logits(model, IDS)
    model.merge_adapter()
    assert torch.equal(logits(model, IDS), summed)


@pytest.mark.parametrize("learn_scales", [True, False])
def test_adapters_of_two_units_are_refused(base: PreTrainedModel, learn_scales: bool):
    model = by_channel(base)
    with refused(model, "add up in one unit.*steps of the row's largest scale. Give both"):
        model.add_adapter("second", other(learn_scales=learn_scales))
    model = random_adapter(tiny(), group_size=-1)
    model.add_adapter("second", other(learn_scales="channel", group_size=-1))  # the same thing there
