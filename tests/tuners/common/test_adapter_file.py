"""Adapter files whose tensors are damaged, or belong elsewhere: refused or said before anything is copied."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_base_model_state_dict
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from peft_lrqat.tuners.common.frozen import FrozenWeight
from tests.models import adapted, logits, tiny, tokens, train
from tests.refusals import refused

LAYER = "base_model.model.model.layers.1.mlp.up_proj."
NAN, INF = math.nan, math.inf

DAMAGE: dict[str, dict[str, list]] = {
    "LR-QAT": {
        "lora_A.weight": [NAN, INF, torch.int32],
        "lora_B.weight": [-INF, torch.int8],
        "lora_scale_shift.weight": [NAN, INF, torch.int64],
    },
    "Low-bit SR": {
        "lowbitsr_scale": [NAN, INF, 0.0, torch.float16],
        "lowbitsr_codes": [torch.float32, torch.int64],
        "lowbitsr_stream": [torch.int32, -5],
    },
}


def damaged(values: torch.Tensor, how) -> torch.Tensor:
    if isinstance(how, torch.dtype):
        return values.to(how)
    values = values.clone()
    values.view(-1)[-1] = how
    return values


def into_an_existing_adapter(method: ModuleType, file: Path) -> Callable:
    def load(model):
        set_peft_model_state_dict(model, load_file(file))

    return load


def test_another_method_does_not_take_its_tensors(method: ModuleType, folder: Path):
    """LoRA's factors are called as LR-QAT's are, and would be taken for them without a word."""
    with pytest.raises(ValueError, match=r"those of an adapter of peft-lrqat.* configuration is a LoraConfig"):
        PeftModel.from_pretrained(tiny(), folder, config=LoraConfig(r=4, target_modules="all-linear"))
    PeftModel.from_pretrained(tiny(), folder, config=method.config())


def test_damaged_values(method: ModuleType, folder: Path):
    file = folder / "adapter_model.safetensors"
    good = load_file(file)
    fresh, adapted = tiny(), method.random_adapter(tiny())
    before = logits(adapted, method.IDS)
    for part, damages in DAMAGE[method.NAME].items():
        for how in damages:
            save_file({**good, LAYER + part: damaged(good[LAYER + part], how)}, file)
            with refused(fresh, rf"{part.partition('.')[0]}.*(must hold|is torch)|has shape"):
                PeftModel.from_pretrained(fresh, folder)
            with pytest.raises((ValueError, RuntimeError), match=r"must hold|made for another grid"):
                set_peft_model_state_dict(adapted, load_file(file))
            assert torch.equal(logits(adapted, method.IDS), before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_layer_of_which_a_part_is_absent(method: ModuleType, folder: Path, low_cpu_mem_usage: bool):
    """Half of it would come from the file, the other half from the start of a training."""
    file = folder / "adapter_model.safetensors"
    good = load_file(file)
    fresh = tiny()
    parts = [key for key in good if key.startswith(LAYER)]
    assert len(parts) == 3
    for absent in parts:
        save_file({key: value for key, value in good.items() if key != absent}, file)
        with refused(fresh, f"a part of module 'model.layers.1.mlp.up_proj', but not '{absent}'"):
            PeftModel.from_pretrained(fresh, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    save_file({key: value for key, value in good.items() if key not in parts}, file)
    with pytest.warns(UserWarning, match="missing adapter keys"):  # PEFT's, of a layer that begins anew
        PeftModel.from_pretrained(fresh, folder)


def test_tensors_that_belong_nowhere_are_named(method: ModuleType, folder: Path):
    file = folder / "adapter_model.safetensors"
    good = load_file(file)
    part = next(iter(DAMAGE[method.NAME]))
    strangers = [LAYER.replace("up_proj", "no_proj") + part, "base_model.model.lm_heads.weight", LAYER + "lora_magic"]
    for key in strangers:
        save_file({**good, key: good[LAYER + part].clone()}, file)
        with pytest.warns(UserWarning, match=r"^1 tensors of the adapter file are no part of adapter 'default'"):
            model = PeftModel.from_pretrained(tiny(), folder)
    assert logits(model, method.IDS).isfinite().all()


def test_a_whole_file_is_loaded_without_a_word(method: ModuleType, tmp_path: Path):
    options = {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5]}
    model = method.random_adapter(tiny("qwen2"), **options)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no part of adapter")
        again = PeftModel.from_pretrained(tiny("qwen2"), tmp_path)
        again.load_adapter(tmp_path, adapter_name="second")
    assert torch.equal(logits(again, method.IDS), logits(model, method.IDS))


def test_nothing_is_loaded_into_an_adapter_that_is_merged(method: ModuleType, folder: Path):
    """The model would go on with the integers that it was merged to."""
    model = method.adapt(tiny(), **method.GRID).eval()
    model.merge_adapter()
    before = logits(model, tokens())
    for load in (lambda: model.load_adapter(folder, "default"), lambda: into(model, folder)):
        with pytest.raises(ValueError, match=r"Adapter 'default' is merged.*`model.unmerge_adapter\(\)` before"):
            load()
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens()), before)
    into(model, folder)
    assert not torch.equal(logits(model, tokens()), before)


def into(model, folder: Path) -> None:
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


# -- an adapter that exists, of other options than the file's


OTHERWISE: dict[str, dict[str, Any]] = {
    "LR-QAT": {"lora_alpha": 5, "use_rslora": True, "act_bits": 8, "kv_bits": 8, "alpha_pattern": {"q_proj": 3}},
    "Low-bit SR": {"forward_bits": 1.58, "act_bits": 8, "kv_bits": 8},
}


def test_options_that_a_file_was_trained_with_and_the_model_has_not_are_said(method: ModuleType, folder: Path):
    """As in a resumed training, where somebody has changed them: PEFT takes the tensors alone."""
    for name, value in OTHERWISE[method.NAME].items():
        model = method.adapt(tiny(), **method.GRID, **{name: value})
        with pytest.warns(UserWarning, match=rf"trained with .*{name}=.* \(here .*keeps its own options"):
            model.load_adapter(folder, "default")
    same = method.adapt(tiny(), **method.GRID, **method.MOVED).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The adapter in")
        same.load_adapter(folder, "default")
        loaded = PeftModel.from_pretrained(tiny(), folder)
        loaded.load_adapter(folder.parent, "default", subfolder=folder.name)
        loaded.load_adapter(folder, "another")
    assert torch.equal(logits(loaded.eval(), tokens()), logits(same, tokens()))


def test_an_adapter_of_another_method_is_not_loaded_into_it(method: ModuleType, tmp_path: Path):
    """LoRA's factors would count grid steps in LR-QAT."""
    get_peft_model(tiny(), LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path)
    model = method.adapt(tiny(), **method.GRID, learn_scales=False).eval()
    before = logits(model, tokens())
    with pytest.raises(
        ValueError, match=rf"an adapter of the method LORA, and adapter 'default' .* one of {method.TYPE}"
    ):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model, tokens()), before)


@pytest.mark.parametrize("trained", [True, False])
def test_scales_that_one_side_has_not_learned_are_not_left_out(method: ModuleType, tmp_path: Path, trained: bool):
    source = method.adapt(tiny(), **method.GRID, learn_scales=trained)
    train(source, tokens())
    source.save_pretrained(tmp_path)
    model = method.adapt(tiny(), **method.GRID, learn_scales=not trained).eval()
    train(model, tokens())
    before = logits(model, tokens())
    said = rf"adapter file {'has' if trained else 'lacks'} '\w+_scale_shift' for module .*`learn_scales`"
    for load in (lambda: model.load_adapter(tmp_path, "default"), lambda: into(model, tmp_path)):
        with pytest.raises(ValueError, match=said):
            load()
    assert torch.equal(logits(model, tokens()), before)


def test_some_tensors_of_an_adapter_are_loaded_beside_the_others(method: ModuleType):
    """As in federated training that exchanges one of two factors, or scales alone."""
    model, source = (method.adapt(tiny(), **method.GRID, learn_scales=True) for _ in range(2))
    train(source, tokens())
    some = {key: value for key, value in get_peft_model_state_dict(source).items() if "scale_shift" in key}
    set_peft_model_state_dict(model, some)
    here = get_peft_model_state_dict(model)
    assert some
    assert all(torch.equal(here[key], value) for key, value in some.items())


# -- a base that is replaced after the model was converted


def test_an_adapter_belongs_to_the_weights_that_were_set_later(method: ModuleType, tmp_path: Path):
    model = method.adapt(tiny(), **method.GRID)
    set_base_model_state_dict(model, tiny(seed=1).state_dict())
    train(model, tokens())
    model.add_adapter("other", method.other())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(seed=1), tmp_path).eval()
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    loaded.load_adapter(tmp_path / "other", "other")
    for folder in (tmp_path, tmp_path / "other"):
        with refused(first := tiny(), "trained on another base model: its float weights"):
            PeftModel.from_pretrained(first, folder)


@pytest.mark.parametrize("assign", [False, True])
def test_an_adapter_belongs_to_the_integers_that_were_loaded(method: ModuleType, tmp_path: Path, assign: bool):
    state = copy.deepcopy(method.random_adapter(tiny()).state_dict())
    model = method.adapt(tiny(seed=1), **method.GRID).eval()
    model.load_state_dict(state, assign=assign)
    with pytest.warns(UserWarning, match="base under adapter 'default' is another than the model was converted to"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path).eval(), tokens()), logits(model, tokens()))
    with refused(first := tiny(seed=1), "trained on another base: its integers have the checksum"):
        PeftModel.from_pretrained(first, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The base under adapter")
        model.save_pretrained(tmp_path)  # it is said once


def test_an_average_of_all_tensors_is_no_adapter_of_that_base(method: ModuleType, tmp_path: Path):
    """An EMA over `state_dict().values()` rounds packed integers down, of the base too."""
    model = method.random_adapter(tiny())
    average = copy.deepcopy(model)
    with torch.no_grad():
        for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            mean.copy_(0.9 * mean + 0.1 * value)
    average.add_adapter("other", method.other())
    with pytest.warns(UserWarning, match=r"leave tensors of integers as they are"):
        average.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "other"):
        with refused(first := tiny(), "trained on another base: its integers have the checksum"):
            PeftModel.from_pretrained(first, folder)


@pytest.mark.parametrize("downcast", ["fx8", "int"])
def test_an_average_of_what_is_float_is_an_adapter_of_that_base(downcast: str, tmp_path: Path):
    """As docs/guides/troubleshooting.md has it, for LR-QAT."""
    model = adapted(tiny(), downcast=downcast)
    average = AveragedModel(
        model, avg_fn=lambda old, new, n: old + (new - old) * 0.1 if old.is_floating_point() else old
    )
    for _ in range(2):
        train(model, tokens(), 1)
        average.update_parameters(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The base under adapter")
        average.module.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(logits(again, tokens()), logits(average.module.eval(), tokens()))
    assert not torch.equal(logits(again, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("places", [[1, 0], [1]])
def test_an_adapter_belongs_to_the_blocks_as_they_are(method: ModuleType, tmp_path: Path, places: list[int]):
    """Names count blocks: those of one that has moved are another's in the model that it began with."""

    def arranged(model):
        model.model.layers = torch.nn.ModuleList([model.model.layers[place] for place in places])
        return model

    model = method.random_adapter(tiny())
    arranged(model.get_base_model())
    before = logits(model, tokens())
    with pytest.warns(UserWarning, match="has taken blocks out or moved them"):
        model.save_pretrained(tmp_path)
    with refused(first := tiny(), "trained on another base"):
        PeftModel.from_pretrained(first, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(arranged(tiny()), tmp_path).eval(), tokens()), before)


def test_a_base_that_nobody_writes_to_is_not_read_again(method: ModuleType, tmp_path: Path, monkeypatch):
    model = method.random_adapter(tiny())
    monkeypatch.setattr(FrozenWeight, "checksum", lambda *args: pytest.fail("a pass over the base in every save"))
    train(model, tokens(), steps=1)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
