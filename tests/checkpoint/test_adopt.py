"""Quantized models that transformers loaded: compressed-tensors (packed, or after a first forward) and BitNet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from tests.models import adapted, logits, low_bit, tiny, tokens, train
from tests.quantized_files import Spec, adapt, write
from tests.trainer import arguments, counting_text, word_tokenizer
from tests.trainer import losses as steps_losses

IDS = tokens()
LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("ran", [False, True], ids=["packed", "after a forward"])
@pytest.mark.parametrize("spec", [Spec("packed", 3, 16), Spec("packed", 8, -1, dtype=torch.bfloat16)], ids=str)
def test_a_model_that_transformers_loaded(spec: Spec, ran: bool, tmp_path: Path):
    expected = logits(write(tmp_path, spec), IDS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    if ran:
        assert torch.equal(logits(model, IDS), expected)
    adapted = adapt(model)
    assert torch.equal(logits(adapted, IDS), expected)
    adapted.unload().save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), IDS), expected)


def test_a_weight_that_left_its_grid_after_loading(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    write(tmp_path, Spec("packed", 4, 32))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model(input_ids=torch.tensor([[3, 4]]))
    layer: nn.Linear = model.get_submodule(LAYER)
    layer.weight.data[0, 0] += 0.013
    with pytest.raises(ValueError, match="does not lie on its grid any more"):
        adapt(model)


def test_rounded_activations_are_not_dropped_in_silence(tmp_path: Path):
    write(tmp_path, Spec("w8a8", 8, -1))
    with pytest.raises(ValueError, match="Int8Linear"):
        adapt(AutoModelForCausalLM.from_pretrained(tmp_path))


# -- a float adapter on our own checkpoints

MERGED = {
    "packed": (lambda: adapted(tiny()), "QuantizedLinear"),
    "two bits": (lambda: low_bit(tiny(), bits=1.58), "QuantizedLinear"),
    "int8 activations": (lambda: adapted(tiny(), act_bits=8, container_bits=8), "Int8Linear"),
    "bitnet": (lambda: low_bit(tiny(), bits=1.58, group_size=0, act_bits=8), "BitNetLinear"),
    # which transformers may load as floats, so that PEFT may merge into them
    "zero points": (lambda: adapted(tiny(), symmetric=False), None),
}
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture
def eager() -> Iterator[None]:
    """Nothing is compiled: transformers unpacks BitNet's codes in a compiled function, which takes 20 s of C++."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", MERGED)
def test_a_lora_on_a_merged_checkpoint_that_transformers_loaded(kind: str, tmp_path: Path):
    make, layer = MERGED[kind]
    merged = make().merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), LoraConfig(**LORA))
    assert torch.equal(logits(model.eval(), IDS), logits(merged, IDS))
    names = {type(module).__name__ for module in model.modules()}
    if layer is None and Version(transformers.__version__) < Version("5.23"):  # which may keep integers
        layer = "QuantizedLinear" if "QuantizedLinear" in names else None
    assert (layer or "Linear") in names
    losses = train(model, IDS, steps=6, lr=2e-2)
    assert losses[-1] < 0.9 * losses[0]
    trained = logits(model, IDS)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tmp_path / "adapter")
    assert torch.equal(logits(again.eval(), IDS), trained)
    if layer:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(RuntimeError, match="second rounding"):
                merge()
    else:
        torch.testing.assert_close(logits(model.merge_and_unload(), IDS), trained, rtol=1e-4, atol=1e-4)


def test_sft_trainer_puts_a_lora_on_a_merged_checkpoint(tmp_path: Path):
    adapted(tiny()).merge_and_unload().save_pretrained(tmp_path / "merged")
    word_tokenizer().save_pretrained(tmp_path / "merged")
    trainer = SFTTrainer(
        model=str(tmp_path / "merged"),
        args=arguments(tmp_path / "out", SFTConfig),
        train_dataset=counting_text(),
        peft_config=LoraConfig(**LORA),
    )
    trainer.train()
    assert steps_losses(trainer)[-1] < steps_losses(trainer)[0]
    assert "QuantizedLinear" in {type(module).__name__ for module in trainer.model.modules()}


@pytest.mark.parametrize("foreign", ["readable", "unreadable"])
def test_models_of_others_are_changed_only_where_peft_fails(foreign: str, tmp_path: Path):
    write(tmp_path, Spec("packed", 4, 32))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    if foreign == "readable":
        logits(model, IDS)  # which makes the weights floats
    before = logits(AutoModelForCausalLM.from_pretrained(tmp_path), IDS)
    lora = get_peft_model(model, LoraConfig(**LORA))
    assert torch.equal(logits(lora, IDS), before)
    assert any("QuantizedLinear" in type(module).__name__ for module in lora.modules()) == (foreign == "unreadable")
