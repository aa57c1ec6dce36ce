import pytest
import torch
from transformers import Trainer, TrainerCallback

from peft_lrqat import QuantizationCallback
from peft_lrqat.monitor import Shares, advice
from tests.models import adapted, low_bit, tiny
from tests.trainer import arguments, ids_dataset

MAKE = {"lrqat": adapted, "lowbit_sr": low_bit}
NAMES = [f"qat_{name}" for name in Shares._fields]


class _Codes(TrainerCallback):
    """All integers at the start, and after every step."""

    def __init__(self):
        self.codes = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._keep(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._keep(model)

    def _keep(self, model):
        layers = [module for module in model.modules() if hasattr(module, "sample_codes")]
        self.codes.append([layer.grid_tensor().codes for layer in layers])


def trained(model, folder, *callbacks, steps=3, **options):
    args = arguments(folder, max_steps=steps, logging_steps=1, **{"learning_rate": 5e-2, **options})
    run = Trainer(model, args, None, ids_dataset(), callbacks=list(callbacks))
    run.train()
    return [entry for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", MAKE)
def test_the_shares_are_those_of_the_integers(method, tmp_path):
    """With as many rows as a layer has, nothing is sampled."""
    codes = _Codes()
    logged = trained(
        MAKE[method](tiny()), tmp_path, codes, QuantizationCallback(rows=10**6, time_share=None, plot=False)
    )
    start, *steps = codes.codes
    mean = lambda shares: torch.stack([share.float().mean() for share in shares]).mean().item()  # noqa: E731
    for entry, now, before in zip(logged, steps, codes.codes, strict=False):
        changed = mean([a != b for a, b in zip(now, start, strict=True)])
        last = mean([a != b for a, b in zip(now, before, strict=True)])
        assert entry["qat_changed"] == pytest.approx(changed, abs=2e-6)
        assert changed > 0
        assert entry["qat_changed_last"] == pytest.approx(last, abs=2e-6)
    way = torch.sign(steps[0][0].int() - start[0].int()), torch.sign(steps[1][0].int() - steps[0][0].int())
    assert (way[0] * way[1] < 0).any() == (logged[1]["qat_reversed"] > 0)
    assert logged[0]["qat_reversed"] == 0 < logged[-1]["qat_edge"] < 1


def test_table_advice_and_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    logged = trained(adapted(tiny()), tmp_path, QuantizationCallback(time_share=None), learning_rate=1e-9)
    said = capsys.readouterr().out
    assert all(name in logged[-1] for name in NAMES)
    assert all(word in said for word in ("q_proj", "all", "Raise the learning rate"))
    assert (tmp_path / "quantization.png").stat().st_size > 1000


def test_advice():
    fine = Shares(changed=0.2, changed_last=0.001, reversed=0.01, edge=0.04, scale_change=0.02)
    assert advice(fine, 0.03) == []
    assert "leave room" in advice(fine._replace(edge=0.2), 0.03)[0]
    assert "back and forth" in advice(fine._replace(reversed=0.15, changed_last=0.1), 0.03)[0]


def test_training_is_the_same(tmp_path):
    losses = []
    for callbacks in ([], [QuantizationCallback(time_share=None, plot=False)]):
        torch.manual_seed(0)
        losses.append([entry["loss"] for entry in trained(adapted(tiny()), tmp_path, *callbacks, steps=2)])
    assert losses[0] == losses[1]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="finds no quantized layer"):
        trained(tiny(), tmp_path, QuantizationCallback())
    with pytest.raises(ValueError, match="`rows` is 0"):
        QuantizationCallback(rows=0)
    with pytest.raises(ValueError, match="`time_share` is 2"):
        QuantizationCallback(time_share=2)
