"""A run that is interrupted goes on where it was, and gives the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_lrqat import LRQATConfig, preprocess_blockwise
from peft_lrqat.calibration import blockwise
from tests.models import tiny, tokens

TEXT = [tokens(4, 32, seed=seed) for seed in range(2, 5)]
ASYMMETRIC = {"bits": 2, "group_size": 16, "symmetric": False}


def trained(folder: Path | None, text=TEXT, model=None, settings: dict | None = None, **options) -> dict:
    model = tiny() if model is None else model
    config = LRQATConfig(**{"target_modules": "all-linear", **ASYMMETRIC, **options})
    preprocess_blockwise(model, config, text, resume_from=folder, progressbar=False, batch=4, **(settings or {}))
    return {name: value for name, value in model.named_buffers() if "weight_" in name}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch):
    calls, train = [], blockwise._train

    def interrupted(*args, **kwargs):
        calls.append(args[4])
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(blockwise, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "new" / "run")
    assert sorted(path.name for path in (tmp_path / "new" / "run").iterdir()) == [
        "block-0000.safetensors",
        "settings.json",
    ]
    again = trained(tmp_path / "new" / "run")
    assert calls == [0, 1, 1]
    assert equal(again, trained(tmp_path / "new" / "run"))  # whose blocks are all there
    integers = trained(tmp_path / "new" / "run", downcast="int")
    assert calls == [0, 1, 1]
    monkeypatch.undo()
    assert equal(again, trained(None))
    assert equal(integers, trained(None, downcast="int"))


def test_a_folder_of_another_run_is_refused(tmp_path: Path):
    trained(tmp_path)
    for other in (
        {"bits": 3},
        {"range_p": 4.0},
        {"settings": {"epochs": 1}},
        {"text": [*TEXT[:-1], TEXT[-1].flip(0)]},
        {"model": tiny(seed=1)},
        {"target_modules": ["q_proj"]},
    ):
        with pytest.raises(ValueError, match="holds blocks of another run"):
            trained(tmp_path, **other)


@pytest.mark.parametrize("what", ["embed_tokens", "norm", "layers.0.input_layernorm", "config"])
def test_the_rest_of_the_model_counts(what: str, tmp_path: Path):
    settings = {"epochs": 1}
    trained(tmp_path, settings=settings)
    other = tiny(rms_norm_eps=0.1 if what == "config" else tiny().config.rms_norm_eps)
    if what != "config":
        other.model.get_submodule(what).weight.data.mul_(2)
    with pytest.raises(ValueError, match=f"another run .{'config' if what == 'config' else 'other_weights'}: "):
        trained(tmp_path, model=other, settings=settings)
    same = tiny()
    same.config._name_or_path = "elsewhere"
    trained(tmp_path, model=same, settings=settings)


def test_a_damaged_file_is_said(tmp_path: Path):
    trained(tmp_path)
    path = tmp_path / "block-0001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="Delete it, and the block is trained again"):
        trained(tmp_path)
