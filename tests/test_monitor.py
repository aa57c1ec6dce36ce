import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainerCallback

from peft_lrqat import Distillation, LRQATConfig, QuantizationCallback, monitor
from peft_lrqat.monitor import Shares, advice, few_changes
from tests.mixtures import mixture
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
    args = arguments(folder, max_steps=steps, **{"learning_rate": 5e-2, **options})
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


def test_few_steps_at_the_usual_rate_want_more_steps_not_a_higher_rate():
    assert few_changes(0.002, 1e-3, 20, 1e-3) == ""
    said = few_changes(0.0004, 1e-3, 20, 1e-3)
    assert said.startswith("Only 0.04 % of the integers have changed in 20 steps")
    assert said.index("Train longer") < said.index("raise the learning rate")
    assert "Raise the learning rate (0.0001; 0.001 is usual)" in few_changes(0.0004, 1e-4, 20, 1e-3)
    assert "onger" not in few_changes(0.0004, 1e-3, 2000, 1e-3)


@pytest.mark.parametrize(("method", "rate", "first"), [
    ("lrqat", 1e-3, "Train longer"), ("lrqat", 1e-4, "Raise"), ("lowbit_sr", 3e-5, "Train longer"),
    ("lowbit_sr", 1e-6, "Raise"),
])  # fmt: skip
def test_the_rate_is_the_optimizers_own_and_the_usual_one_the_methods(method, rate, first, tmp_path, capsys):
    """`args.learning_rate` is what whoever brings an optimizer leaves at its default, and a schedule ends at 0."""
    model = MAKE[method](tiny())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    args = arguments(tmp_path, max_steps=1)
    callbacks = [QuantizationCallback(plot=False)]
    Trainer(model, args, None, ids_dataset(), callbacks=callbacks, optimizers=(optimizer, None)).train()
    said = capsys.readouterr().out
    assert f"in 1 steps, so the model is nearly the rounded one. {first}" in said
    assert f"({rate:.2g}; " in said


def test_training_is_the_same(tmp_path):
    losses = []
    for callbacks in ([], [QuantizationCallback(time_share=None, plot=False)]):
        torch.manual_seed(0)
        losses.append([entry["loss"] for entry in trained(adapted(tiny()), tmp_path, *callbacks, steps=2)])
    assert losses[0] == losses[1]


def test_an_adapter_that_goes_takes_the_figures_of_its_own_layers_only():
    model = adapted(tiny(num_hidden_layers=1))
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "sample_codes")}
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    watched = monitor.watch(model, 8)
    for layer in layers.values():
        layer.lora_scale_shift["default"].weight.data.fill_(0.25)
    gate, up = (next(name for name in layers if kind in name) for kind in ("gate_proj", "up_proj"))
    layers[up].delete_adapter("default")

    def looked():
        return {name: shares for one in watched for name, shares in zip(one.layers, one.look(), strict=True)}

    assert not looked()[up].any()
    change = Shares._fields.index("scale_change")
    assert all(looked()[name][change] == 0.25 for name in layers if name != up)
    other = LRQATConfig(r=2, group_size=-1, learn_scales=False, target_modules=["gate_proj"], task_type="CAUSAL_LM")
    model.add_adapter("other", other)
    model.set_adapter("other")  # which trains no scales
    edge = looked()[gate]
    assert edge[change] == 0 < edge[Shares._fields.index("edge")]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="finds no quantized layer"):
        trained(tiny(), tmp_path, QuantizationCallback())
    with pytest.raises(ValueError, match="`rows` is 0"):
        QuantizationCallback(rows=0)
    with pytest.raises(ValueError, match="`time_share` is 2"):
        QuantizationCallback(time_share=2)
    with pytest.raises(ValueError, match="`time_share` is '1%'"):
        QuantizationCallback(time_share="1%")
    with pytest.raises(ValueError, match=r"`plot` is 'curves\.png'; allowed are True, False"):
        QuantizationCallback(plot="curves.png")


def test_resumed_training_goes_on_counting(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    watch = QuantizationCallback(time_share=None, plot=False)
    whole = trained(adapted(tiny()), tmp_path, watch, steps=4, **options)
    args = arguments(tmp_path, max_steps=4, logging_steps=1, learning_rate=5e-2)
    again = QuantizationCallback(time_share=None, plot=False)
    run = Trainer(adapted(tiny()), args, None, ids_dataset(), callbacks=[again])
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed = [entry for entry in run.state.log_history if "loss" in entry]
    assert [{name: entry[name] for name in NAMES} for entry in resumed] == [
        {name: entry[name] for name in NAMES} for entry in whole
    ]
    assert list(again._curves) == [1, 2, 3, 4]


def test_a_checkpoint_before_the_first_log_holds_the_start(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 2}
    watch = QuantizationCallback(time_share=None, plot=False)
    (whole,) = trained(adapted(tiny()), tmp_path, watch, steps=2, **options)
    args = arguments(tmp_path, max_steps=2, learning_rate=5e-2, logging_steps=2)
    run = Trainer(adapted(tiny()), args, None, ids_dataset(), callbacks=[watch])
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert run.state.log_history[0]["qat_changed"] == whole["qat_changed"]


def test_a_checkpoint_without_samples_is_said(tmp_path, caplog):
    trained(adapted(tiny()), tmp_path, steps=2, save_strategy="steps", save_steps=1)
    args = arguments(tmp_path, max_steps=2, logging_steps=1)
    run = Trainer(
        adapted(tiny()), args, None, ids_dataset(), callbacks=[QuantizationCallback(time_share=None, plot=False)]
    )
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "counts from step 1 on" in caplog.text
    assert all(name in run.state.log_history[1] for name in NAMES)


@pytest.mark.parametrize(("few", "looked"), [(8, [1, 4, 7]), (9, list(range(1, 10)))])
def test_looking_takes_its_share_of_the_time(few, looked, tmp_path, monkeypatch):
    """On a clock where a step takes 1 s and a look 0.025 s, every third log is looked at, with a share of 1 %; or every
    log of a training with few."""
    monkeypatch.setattr(monitor, "_FEW_LOGS", few)
    clock = [0.0]

    class Steps(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock[0] += 1

    class Slow(monitor._Watched):
        def look(self):
            clock[0] += 0.025 / 4  # layers of so many shapes
            return super().look()

    monkeypatch.setattr(monitor.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(monitor, "_Watched", Slow)
    logged = trained(adapted(tiny()), tmp_path, Steps(), QuantizationCallback(plot=False), steps=9)
    assert [entry["step"] for entry in logged if "qat_changed" in entry] == looked


def test_of_many_layers_some_are_watched(monkeypatch):
    """As many of each kind, the first and the last among them; each once."""
    monkeypatch.setattr(monitor, "_LAYERS", 3)
    watched = [name for some in monitor.watch(adapted(tiny(num_hidden_layers=5)), 8) for name in some.layers]
    assert len(watched) == len(set(watched)) == 7 * 3
    assert {name.split("layers.")[1][0] for name in watched} == {"0", "2", "4"}


def test_only_some_rows_are_computed(tmp_path, monkeypatch):
    """What a look costs: of each layer the integers of eight rows, and the scales of as many."""
    rows = []
    for layer in {type(layer) for layer in adapted(tiny()).modules() if hasattr(layer, "sample_codes")}:
        look = layer.sample_codes
        monkeypatch.setattr(
            layer, "sample_codes", lambda self, r, a, look=look: rows.append(len(r)) or look(self, r, a)
        )
    trained(adapted(tiny()), tmp_path, QuantizationCallback(time_share=None, plot=False), steps=1)
    assert max(rows) == 8


@pytest.mark.parametrize("method", MAKE)
def test_it_goes_with_accumulated_gradients_and_is_silent_in_evaluation(method, tmp_path):
    watch = QuantizationCallback(time_share=None, plot=False)
    model = MAKE[method](tiny())
    args = arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1)
    run = Trainer(model, args, None, ids_dataset(), ids_dataset(), callbacks=[watch])
    assert "qat_changed" not in run.evaluate()
    run.train()
    for entry in run.state.log_history:
        assert ("qat_changed" in entry) == ("loss" in entry or "train_runtime" in entry)
    assert not any(name in run.evaluate() for name in NAMES)


def test_of_several_adapters_the_trained_one_is_watched(tmp_path):
    model = adapted(tiny())
    trained(model, tmp_path, steps=1)
    model.add_adapter("other", LRQATConfig(r=2, group_size=-1, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    watch = QuantizationCallback(time_share=None, plot=False)
    logged = trained(model, tmp_path, watch, steps=1)
    assert logged[0]["qat_changed"] > 0
    run = Trainer(model, arguments(tmp_path, max_steps=1, learning_rate=0.0), None, ids_dataset(), callbacks=[watch])
    run.train()
    assert run.state.log_history[0]["qat_changed"] == 0  # what the other adapter has moved is no change


def test_experts_are_watched(tmp_path, capsys):
    logged = trained(adapted(mixture()), tmp_path, QuantizationCallback(time_share=None, plot=False), steps=1)
    assert logged[0]["qat_changed"] > 0
    assert "gate_up_proj" in capsys.readouterr().out


def test_the_teachers_kl_is_in_the_summary_and_the_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    watch = QuantizationCallback(time_share=None)
    logged = trained(adapted(tiny()), tmp_path, Distillation(tiny()), watch, steps=2)
    said = capsys.readouterr().out
    assert (
        f"KL to the teacher, a token: {logged[0]['kl']:.3g} at the first log, {logged[1]['kl']:.3g} at the last" in said
    )
    assert Image.open(tmp_path / "quantization.png").height == 900  # two plots


def test_scales_that_grow_with_their_weights_have_changed(tmp_path):
    class Grows(TrainerCallback):
        """As 8-bit scales of low-bit SR do when their weights fill the grid, though nobody trains them."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            for layer in model.modules():
                if hasattr(layer, "sample_codes"):
                    layer.lowbitsr_weight["default"].weight.scale.mul_(1.5)

    watch = QuantizationCallback(time_share=None, plot=False)
    (entry,) = trained(low_bit(tiny(), bits=8), tmp_path, Grows(), watch, steps=1, learning_rate=1e-9)
    assert entry["qat_scale_change"] == pytest.approx(0.5, abs=1e-5)
