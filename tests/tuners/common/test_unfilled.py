"""`low_cpu_mem_usage` is for adapters whose values are loaded: who trains one without values is told so."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

from tests.models import logits, tiny, tokens

IDS = tokens()
SAYS = "`low_cpu_mem_usage=True` makes adapter 'default' without values.*leave `low_cpu_mem_usage` out"
REFUSES = r"parameters that would be trained have no values, e\.g\. .*set_peft_model_state_dict"


def test_training_a_new_adapter_without_values_is_refused(method: ModuleType):
    with pytest.warns(UserWarning, match=SAYS):
        model = get_peft_model(tiny(), method.config(task_type="CAUSAL_LM"), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match=REFUSES):
        model(input_ids=IDS, labels=IDS)
    with pytest.raises(ValueError, match=REFUSES):
        model.train()


def test_it_is_trained_once_it_has_values(method: ModuleType):
    config = method.config(task_type="CAUSAL_LM")
    tensors = get_peft_model_state_dict(get_peft_model(tiny(), config))
    with pytest.warns(UserWarning, match=SAYS):
        model = get_peft_model(tiny(), config, low_cpu_mem_usage=True)
    set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None for p in model.parameters())


def test_who_loads_an_adapter_is_not_warned(method: ModuleType, tmp_path: Path):
    model = get_peft_model(tiny(), method.config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=SAYS)
        PeftModel.from_pretrained(tiny(), tmp_path, low_cpu_mem_usage=True)
        again = PeftModel.from_pretrained(tiny(), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    again.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    again.train()
    assert torch.isfinite(again(input_ids=IDS, labels=IDS).loss)


def test_an_adapter_that_waits_beside_the_trained_one_is_no_obstacle(method: ModuleType):
    model = get_peft_model(tiny(), method.config(task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match="adapter 'other'"):
        model.add_adapter("other", method.config(), low_cpu_mem_usage=True)
    model.train()
    assert torch.isfinite(model(input_ids=IDS, labels=IDS).loss)


def test_injected_adapters_may_wait_too(method: ModuleType):
    with pytest.warns(UserWarning, match=SAYS):
        lazy = inject_adapter_in_model(method.config(), tiny(), low_cpu_mem_usage=True)
    assert {value.device.type for value in get_peft_model_state_dict(lazy).values()} == {"meta"}


def test_nor_with_one_that_has_a_part_of_its_values(method: ModuleType):
    config = method.config(task_type="CAUSAL_LM", learn_scales=True)
    tensors = get_peft_model(tiny(), config).state_dict()
    adapter = [key for key in tensors if "layers.1.mlp.up_proj" in key and ".default" in key]
    parts = [key for key in adapter if "stream" not in key]  # which training alone looks at
    assert len(parts) == 3
    for absent in parts:
        with pytest.warns(UserWarning, match=SAYS):
            model = get_peft_model(tiny(), config, low_cpu_mem_usage=True).eval()
        some = {key: value for key, value in tensors.items() if key != absent}
        model.load_state_dict(some, strict=False, assign=True)  # PEFT's own ways are refused (`adapter_file.py`)
        for compute in (lambda model=model: model.generate(input_ids=IDS, max_new_tokens=2), model.merge_and_unload):
            with pytest.raises(
                ValueError, match=r"^Adapter 'default' has no values in layer 'model\.layers\.1\.mlp\.up_proj'"
            ):
                compute()


def test_saving_one_without_values_is_refused_before_anything_is_written(method: ModuleType, tmp_path: Path):
    model = get_peft_model(tiny(), method.config(task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match="adapter 'other'"):
        model.add_adapter("other", method.config(), low_cpu_mem_usage=True)
    for chosen in (None, ["other"]):
        with pytest.raises(ValueError, match=r"^Adapter 'other' cannot be saved: it has no values, e\.g\. in layer"):
            model.save_pretrained(tmp_path / "adapter", selected_adapters=chosen)
    assert not (tmp_path / "adapter").exists()
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    tensors = get_peft_model_state_dict(PeftModel.from_pretrained(tiny(), tmp_path / "adapter"))
    set_peft_model_state_dict(model, tensors, "other", low_cpu_mem_usage=True)
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "other" / "adapter_model.safetensors").exists()


def test_nor_is_anything_written_of_an_adapter_that_is_merged_away(method: ModuleType, tmp_path: Path):
    model = get_peft_model(tiny(), method.config(task_type="CAUSAL_LM"))
    model.merge_and_unload()
    with pytest.raises(ValueError, match="cannot be saved: the model has no layer of it any more"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "for inference"])
def test_no_road_computes_with_an_adapter_without_values(method: ModuleType, trained: bool):
    """Also those that pass by the tuner's forward, and adapters that are not trained."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=SAYS)
        config = method.config(task_type="CAUSAL_LM", inference_mode=not trained)
        model = get_peft_model(tiny(), config, low_cpu_mem_usage=True).eval()
    layer = next(iter(method.layers(model).values()))
    for compute in (
        lambda: model.generate(input_ids=IDS, max_new_tokens=2),
        lambda: model.base_model.model(input_ids=IDS),
        lambda: model(input_ids=IDS) if not trained else model.base_model.model(input_ids=IDS),
        lambda: layer.weight,
        model.merge_adapter,
        model.merge_and_unload,
    ):
        with pytest.raises(
            ValueError, match=r"^Adapter 'default' has no values in layer 'model\.layers\.0\..*fresh copy"
        ):
            compute()
    assert not any(layer.merged for layer in method.layers(model).values())
    with model.disable_adapter():
        assert torch.isfinite(logits(model, IDS)).all()
