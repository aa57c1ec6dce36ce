"""Options of LR-QAT survive, and a base is known by what it converts to. (`common/test_save_load.py`: the rest.)"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_lrqat.tuners.common.frozen import FrozenWeight
from tests.lrqat import MOVED, config, integers, layers, random_adapter
from tests.models import adapted, logits, tiny, tokens, train

IDS = tokens()


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "symmetric": False, "group_size": 16},
        {"bits": 4, "group_size": 0, "downcast": "int", "init_lora_weights": "loftq"},
        {"bits": 8, "downcast": "fp16", "learn_scales": False},
        {"bits": 4, "range_method": "minmax", "scale_dtype": "bf16"},
        {"learn_scales": "channel", "group_size": 16, "bits": 3, "downcast": "int", "init_lora_weights": "loftq"},
        {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 4, 5]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}, "use_rslora": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option_survives(base_folder: Path, tmp_path: Path, options: dict):
    model = adapted(load(base_folder), **options)
    train(model, IDS, steps=2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(base_folder), tmp_path).eval()
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    saved, here = again.peft_config["default"].to_dict(), model.peft_config["default"].to_dict()
    assert saved == {**here, "inference_mode": True}


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_survive(tmp_path: Path, bias: str):
    base = tiny("qwen2")
    model = adapted(copy.deepcopy(base), target_modules=["q_proj"], bias=bias)
    train(model, IDS)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_saving_and_loading_build_no_float_weight(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = adapted(load(base_folder))

    def refuse(self: FrozenWeight) -> torch.Tensor:
        raise AssertionError("a float weight was built")

    monkeypatch.setattr(FrozenWeight, "weight", property(refuse))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(load(base_folder), tmp_path)


def test_a_bf16_base_and_its_fp32_copy_are_one_base(tmp_path: Path):
    low = tiny(dtype=torch.bfloat16)
    adapted(copy.deepcopy(low)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(low).float(), tmp_path)
    first, second = adapted(low), model
    assert all(torch.equal(a, b) for a, b in zip(integers(first), integers(second), strict=True))


def _checksums(folder: Path) -> dict[str, torch.Tensor]:
    return {key: v for key, v in load_file(folder / "adapter_model.safetensors").items() if "checksum" in key}


def test_one_number_says_over_which_integers_an_adapter_was_trained(base_folder: Path, tmp_path: Path):
    model = adapted(load(base_folder), bits=3)
    config = model.peft_config["default"]
    model.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_checksum"] == config.base_checksum
    ((_, number),) = _checksums(tmp_path / "a").items()
    assert f"v2:{int(number[0]) % 2**64:016x}" == config.base_checksum
    assert number[1:].tolist() == [2]
    assert not any("checksum" in name for name in model.state_dict())
    again = adapted(load(base_folder), bits=3)
    assert again.peft_config["default"].base_checksum == config.base_checksum
    for other in (adapted(load(base_folder), bits=4), adapted(load(base_folder), bits=3, range_method="minmax")):
        assert other.peft_config["default"].base_checksum != config.base_checksum


def _as_before(folder: Path, model: PeftModel) -> None:
    """The file as earlier versions wrote it: a checksum for each layer, none in the configuration."""
    path = folder / "adapter_model.safetensors"
    values = {key: value for key, value in load_file(path).items() if "checksum" not in key}
    for name, layer in layers(model).items():
        values[f"{name}.lora_base_checksum"] = layer.frozen.checksum(version=1).view(1)
    save_file(values, path)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["base_checksum"]
    path.write_text(json.dumps(config))


def test_adapters_of_earlier_versions_are_loaded_and_their_base_is_checked(
    base_folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture
):
    model = adapted(load(base_folder), bits=3, init_lora_weights=False).eval()
    model.save_pretrained(tmp_path)
    _as_before(tmp_path, model)
    recwarn.clear()
    for again in (PeftModel.from_pretrained(load(base_folder), tmp_path), load(base_folder)):
        if not isinstance(again, PeftModel):
            again.load_adapter(str(tmp_path))
        assert torch.equal(logits(again.eval(), IDS), logits(model, IDS))
    assert not [w for w in recwarn if "checksum" in str(w.message) or "missing" in str(w.message)]
    assert "checksum" not in capfd.readouterr().err
    other = adapted(tiny(seed=1), bits=3, init_lora_weights=False).eval()
    before = logits(other, IDS)
    with pytest.raises(ValueError, match="trained on another base: its integers have the checksum"):
        other.load_adapter(tmp_path, adapter_name="default")
    assert torch.equal(logits(other, IDS), before)


# -- state dicts of the whole model, with the base as the float weight that it stands for


def test_a_state_dict_of_adapters_and_weights_is_read_back_over_the_same_base():
    """The weights are the rounded ones: taken for the base, they would leave its fractions of grid steps out."""
    options = {"lora_alpha": 32}  # as `random_adapter` has it
    for model in (random_adapter(tiny()).get_base_model(), inject_adapter_in_model(config(**MOVED, **options), tiny())):
        before, codes = logits(model.eval(), IDS), integers(model)
        state = copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        assert torch.equal(logits(model, IDS), before)
        fresh = inject_adapter_in_model(config(**options), tiny()).eval()
        fresh.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(integers(fresh), codes, strict=True))


@pytest.mark.parametrize("rank", [4, 0])
def test_over_another_base_it_is_refused(rank: int):
    options = {"r": rank, **({} if rank == 0 else MOVED)}
    state = inject_adapter_in_model(config(**options), tiny()).state_dict()
    other = inject_adapter_in_model(config(**options), tiny(seed=1)).eval()
    with pytest.raises(
        RuntimeError, match=r"q_proj\.base_layer\.weight is that of another base\..*has the base rounded"
    ):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"or was cast: it is torch\.bfloat16, the model's is torch\.float32\."):
        inject_adapter_in_model(config(**options), tiny()).load_state_dict({k: v.bfloat16() for k, v in state.items()})
