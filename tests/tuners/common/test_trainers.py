import warnings

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback

from peft_lrqat import load_quantized
from peft_lrqat.tuners.common.trainers import log_before_trackers
from tests.models import adapted, tiny
from tests.trainer import arguments, ids_dataset


class _Adds(TrainerCallback):
    began = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.began += 1
        log_before_trackers(self)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs["added"] = 1.0


class _Tracker(TrainerCallback):
    """Reads the log where TensorBoard's callback does: before the callbacks that a user adds."""

    def __init__(self):
        self.began, self.seen = 0, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.began += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append("added" in logs)


def test_trackers_see_what_a_callback_adds_and_each_is_called_once(tmp_path):
    before, adds, behind = _Tracker(), _Adds(), _Tracker()
    run = Trainer(tiny(), arguments(tmp_path, max_steps=2), None, ids_dataset(), callbacks=[before, adds, behind])
    run.train()
    assert before.seen == behind.seen
    assert before.seen[0]
    assert (before.began, adds.began, behind.began) == (1, 1, 1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_of_which_nothing_is_trained_is_refused(checkpointing: bool, tmp_path):
    """With gradient checkpointing, transformers has the embeddings' outputs require gradients: backward finds some."""
    model = adapted(tiny(), group_size=8)
    model.save_pretrained(tmp_path / "adapter")
    args = arguments(tmp_path, max_steps=1, gradient_checkpointing=checkpointing)
    for loaded in (PeftModel.from_pretrained(tiny(), tmp_path / "adapter"), model.requires_grad_(False)):
        with pytest.raises(ValueError, match=r"Nothing of the model would be trained.*`is_trainable=True`"):
            Trainer(loaded, args, None, ids_dataset()).train()
        Trainer(loaded, args, None, ids_dataset(), ids_dataset()).evaluate()
        loaded.train()  # where no Trainer trains it
    going_on = PeftModel.from_pretrained(tiny(), tmp_path / "adapter", is_trainable=True)
    Trainer(going_on, args, None, ids_dataset()).train()


def test_adapters_that_are_merged_are_not_trained(tmp_path):
    args = arguments(tmp_path, max_steps=1, gradient_checkpointing=True)
    model = adapted(tiny(), group_size=8)
    model.merge_adapter()
    run = Trainer(model, args, None, ids_dataset(), ids_dataset())
    run.evaluate()
    with pytest.raises(ValueError, match=r"adapters \['default'\] would be trained: they are merged.*unmerge_adapter"):
        run.train()
    model.unmerge_adapter()
    run.train()
    model.merge_and_unload()
    with pytest.raises(ValueError, match="its adapters were merged"):
        run.train()


def test_a_merged_model_is_frozen(tmp_path):
    args = arguments(tmp_path, max_steps=1, gradient_checkpointing=True)
    merged = adapted(tiny(), group_size=8).merge_and_unload()
    with pytest.raises(ValueError, match="Nothing is trained: the model has 14 quantized layers, and is frozen"):
        Trainer(merged, args, None, ids_dataset()).train()


def test_what_is_trained_of_a_quantized_model_without_an_adapter_is_said(tmp_path):
    args = arguments(tmp_path, max_steps=2)
    adapted(tiny(), group_size=8).merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded = load_quantized(tmp_path / "merged")
    with pytest.warns(
        UserWarning, match="integers of the 14 quantized layers stay.*such as 'model.embed_tokens.weight'"
    ):
        Trainer(loaded, args, None, ids_dataset()).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The integers of")
        Trainer(tiny(), args, None, ids_dataset()).train()
        Trainer(adapted(load_quantized(tmp_path / "merged"), group_size=8), args, None, ids_dataset()).train()
        lora = get_peft_model(load_quantized(tmp_path / "merged"), LoraConfig(target_modules="all-linear"))
        Trainer(lora, args, None, ids_dataset()).train()


def test_a_teacher_that_is_on_a_grid_itself_is_not_trained(tmp_path):
    teacher = adapted(tiny(seed=1), group_size=8).requires_grad_(False)
    student = adapted(tiny(), group_size=8)
    Trainer(student, arguments(tmp_path, max_steps=1), None, ids_dataset(), callbacks=[_Trains(teacher)]).train()


class _Trains(TrainerCallback):
    def __init__(self, other):
        self.other = other

    def on_step_begin(self, args, state, control, **kwargs):
        self.other.train()


def test_called_by_nobody_it_does_nothing():
    log_before_trackers(_Adds())
