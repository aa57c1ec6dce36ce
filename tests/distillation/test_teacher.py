import copy

import pytest
import torch
from torch import nn

from peft_lrqat.distillation.teacher import ModelTeacher, keep_in_8_bits, load_teacher
from peft_lrqat.modules.packed import QuantizedLinear
from tests.models import logits, tiny, tokens

IDS = tokens()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny(hidden_size=128, intermediate_size=128).save_pretrained(folder)
    return folder


def test_by_name_it_has_the_students_dtype(folder):
    student = tiny(dtype=torch.bfloat16)
    for keep in (None, "cpu"):
        teacher = load_teacher(folder, student, keep)
        assert teacher.dtype == torch.bfloat16
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())
        assert torch.equal(
            logits(teacher, IDS), logits(type(student).from_pretrained(folder, dtype=torch.bfloat16), IDS)
        )


def test_8_bits_are_close_to_the_float_model(folder):
    teacher = load_teacher(folder, tiny(), "int8")
    kinds = {type(layer) for name, layer in teacher.named_modules() if name.endswith("_proj")}
    assert kinds == {QuantizedLinear}
    assert type(teacher.lm_head) is nn.Linear
    found, expected = (logits(model, IDS).log_softmax(-1) for model in (teacher, type(teacher).from_pretrained(folder)))
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-3


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_8_bits_of_other_families(family):
    model = tiny(family, tie=True)
    expected = logits(model, IDS)
    keep_in_8_bits(model, torch.device("cpu"))
    torch.testing.assert_close(logits(model, IDS), expected, rtol=0.1, atol=0.1)


def test_what_the_student_is_called_with_reaches_it():
    model = tiny().train()
    teacher = ModelTeacher(model, tiny())
    assert not model.training
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    inputs = {"input_ids": IDS, "attention_mask": mask, "labels": IDS, "num_items_in_batch": 3, "use_cache": True}
    found = teacher.targets(inputs, IDS)
    with torch.no_grad():
        assert torch.equal(found, model(input_ids=IDS, attention_mask=mask).logits)
    with pytest.raises(ValueError, match="without `input_ids`"):
        teacher.targets({"inputs_embeds": torch.zeros(1, 2, 32)}, IDS)
    teacher.release()
    assert model.training


def test_a_teacher_that_is_trained_is_refused(method):
    base = tiny()
    copied = copy.deepcopy(base)
    model = method.adapt(base, bits=8)
    for teacher in (base, model):
        with pytest.raises(ValueError, match="follow its student"):
            ModelTeacher(teacher, model.get_base_model())
    ModelTeacher(copied, model.get_base_model())


def test_ranks_that_fsdp_leaves_without_weights_get_theirs(folder, monkeypatch):
    import transformers.modeling_utils as modeling

    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(modeling, "is_local_dist_rank_0", lambda: False)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    teacher = load_teacher(folder, tiny(), None)
    monkeypatch.undo()
    assert torch.equal(logits(teacher, IDS), logits(load_teacher(folder, tiny(), None), IDS))


def test_zero_3_would_shard_it(folder, monkeypatch):
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3"):
        load_teacher(folder, tiny(), None)
