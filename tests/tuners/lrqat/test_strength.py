"""How strongly an adapter acts: 16 grid steps in every layer, unless somebody says otherwise."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from transformers import PreTrainedModel

from peft_lrqat import LRQATConfig
from tests.lrqat import config, layers
from tests.models import logits, tiny, tokens

PATTERNS = {"rank_pattern": {"q_proj": 8, "layers.1.*": 3}}


def strengths(model: PeftModel, name: str = "default") -> dict[str, float]:
    return {path.removeprefix("base_model.model.model."): layer.scaling[name] for path, layer in layers(model).items()}


def adapt(model: PreTrainedModel, **options) -> PeftModel:
    return get_peft_model(model, config(init_lora_weights=False, **options))


@pytest.mark.parametrize(
    "options",
    [{}, {"r": 32}, {"use_rslora": True}, PATTERNS, {"use_rslora": True, "r": 5, **PATTERNS}],
    ids=["rank 4", "rank 32", "rslora", "ranks", "rslora and ranks"],
)
def test_the_default_is_16_in_every_layer(options: dict, tmp_path: Path):
    model = adapt(tiny(), **options)
    assert set(strengths(model).values()) == {16}
    assert len(strengths(model)) == 14
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path)
    assert set(strengths(again).values()) == {16}
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["lora_alpha"] is not None  # the file says what was trained


def test_a_rank_for_no_layer_is_warned_of_once(tmp_path: Path):
    options = {"rank_pattern": {"q_proj": 8, "nope": 2}}
    given = config(**options)
    with pytest.warns(RuntimeWarning, match="did not match any targeted module") as caught:
        model = get_peft_model(tiny(), given)
    said = [str(one.message) for one in caught if "did not match" in str(one.message)]
    assert len(said) == 1
    assert said[0].startswith("The following rank_pattern keys")
    assert "'nope'" in said[0]
    assert given.alpha_pattern.keys() == {"q_proj", "nope"}  # its owner may use it for another model
    assert set(strengths(model).values()) == {16}
    model.save_pretrained(tmp_path)
    with pytest.warns(RuntimeWarning, match="rank_pattern keys"):
        assert strengths(PeftModel.from_pretrained(tiny(), tmp_path)) == strengths(model)
    with pytest.warns(RuntimeWarning, match=r"alpha_pattern keys.*'mine'"):
        get_peft_model(tiny(), config(alpha_pattern={"mine": 3.0}, **options))


def test_an_explicit_lora_alpha_means_what_it_means_to_peft():
    r, alpha = 4, 20
    assert set(strengths(adapt(tiny(), lora_alpha=alpha)).values()) == {alpha / r}
    assert set(strengths(adapt(tiny(), lora_alpha=alpha, use_rslora=True)).values()) == {alpha / 2}
    some = strengths(adapt(tiny(), lora_alpha=alpha, rank_pattern={"q_proj": 8}, alpha_pattern={"k_proj": 2}))
    assert {name.rpartition(".")[2]: value for name, value in some.items()} == {
        **dict.fromkeys(("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 5), "q_proj": 2.5, "k_proj": 0.5
    }  # fmt: skip


def test_files_of_before_keep_their_strength(tmp_path: Path):
    # they say lora_alpha = 16 r, which a `rank_pattern` and `use_rslora` divided otherwise
    model = adapt(tiny(), lora_alpha=64, use_rslora=True, **PATTERNS)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path)
    assert strengths(again) == strengths(model)
    assert strengths(again)["layers.1.mlp.up_proj"] == 64 / 3**0.5


def test_the_first_pattern_that_matches_counts_after_loading_too(tmp_path: Path):
    # "z.*" comes last where names are sorted
    patterns = {
        "rank_pattern": {"layers.1.*": 2, ".*": 3},
        "alpha_pattern": {"q_proj": 6, "layers.1.*": 5, ".*_proj": 9},
    }
    model = adapt(tiny(), **patterns)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path)
    assert strengths(again) == strengths(model)
    found = {layer: strengths(model)[f"layers.{layer}"] for layer in ("0.self_attn.q_proj", "1.self_attn.q_proj")}
    assert found == {"0.self_attn.q_proj": 2, "1.self_attn.q_proj": 3}


def test_the_default_follows_what_is_set_afterwards():
    own = config()
    own.r, own.rank_pattern = 2, {"q_proj": 5}
    model = get_peft_model(tiny(), own)
    assert set(strengths(model).values()) == {16}
    own = config()
    own.lora_alpha = 12
    assert set(strengths(get_peft_model(tiny(), own)).values()) == {3}
    for again in (copy.copy(own), copy.deepcopy(own), LRQATConfig(**{"r": own.r, "lora_alpha": own.lora_alpha})):
        assert again.lora_alpha == 12


@pytest.mark.parametrize("combination", ["svd", "cat", "linear"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_combination_of_one_adapter_is_that_adapter(combination: str, rslora: bool):
    model = adapt(tiny(), use_rslora=rslora).eval()
    model.add_adapter("other", config(init_lora_weights=False, learn_scales=False))
    for layer in layers(model).values():
        layer.lora_scale_shift["default"].weight.data.fill_(0.125)
    model.add_weighted_adapter(["other", "default"], [0.0, 1.0], "both", combination_type=combination)
    for layer in layers(model).values():
        torch.testing.assert_close(layer.get_delta_weight("both"), layer.get_delta_weight("default"))
        assert torch.equal(layer.lora_scale_shift["both"].weight, layer.lora_scale_shift["default"].weight)


@pytest.mark.parametrize("how", ["rescale_adapter_scale", "set_scale"])
def test_a_factor_on_an_adapter_acts_inside_the_rounding_and_is_merged(how: str):
    """Of learned scales there is no factor: without them 0 is the model at step 0."""
    model, ids = adapt(tiny(), learn_scales=False).eval(), tokens()
    whole = logits(model, ids)
    with model.disable_adapter():
        base = logits(model, ids)
    for factor, expected in ((0, base), (0.5, None), (1, whole)):
        context = rescale_adapter_scale(model, factor) if how == "rescale_adapter_scale" else contextlib.nullcontext()
        if how == "set_scale":
            for layer in layers(model).values():
                layer.set_scale("default", factor)
        with context:
            found = logits(model, ids)
            merged = copy.deepcopy(model).merge_and_unload()
        assert torch.equal(logits(merged, ids), found)
        assert expected is None or torch.equal(found, expected)
        assert (factor == 0.5) == (not torch.equal(found, base) and not torch.equal(found, whole))
    assert torch.equal(logits(model, ids), whole)
