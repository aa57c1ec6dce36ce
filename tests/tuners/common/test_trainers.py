from transformers import Trainer, TrainerCallback

from peft_lrqat.tuners.common.trainers import log_before_trackers
from tests.models import tiny
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


def test_called_by_nobody_it_does_nothing():
    log_before_trackers(_Adds())
