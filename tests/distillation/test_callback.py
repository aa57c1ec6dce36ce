import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from peft_lrqat import Distillation, distillation_loss, store_logits
from peft_lrqat.distillation.teacher import causal_lm
from peft_lrqat.tuners.common.loss import causal_lm_loss
from tests import parallel
from tests.models import adapted, logits, low_bit, tiny, tokens
from tests.trainer import arguments, counting_text, ids_dataset, losses, word_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
KINDS = {"lrqat": adapted, "lowbit_sr": low_bit}
PLAIN = {
    "gemma2": lambda: tiny("gemma2", tie=True, final_logit_softcapping=2.0),
    "granite": lambda: _like_llama("Granite", logits_scaling=8.0),
    "mixtral": lambda: _like_llama("Mixtral", num_local_experts=4, output_router_logits=True),
}
TEACHER = tiny(seed=1)


class ByHand(Trainer):
    """The same loss in a Trainer's own `compute_loss`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        with torch.no_grad():
            teacher = self.teacher(**inputs).logits
        outputs = model(**inputs)
        return distillation_loss(outputs.logits, labels, teacher, num_items_in_batch=num_items_in_batch, **self.options)


def _like_llama(name, **options):
    config = getattr(transformers, name + "Config")(**{**tiny().config.to_dict(), "model_type": None, **options})
    return transformers.AutoModelForCausalLM.from_config(config)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def served_is_trained(model, folder: Path):
    trained = logits(model.eval(), tokens())
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, tokens()), trained)
    merged.save_pretrained(folder / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    assert torch.equal(logits(again, tokens()), trained)


def trainer(model, folder: Path, *callbacks, cls=Trainer, data=None, **options):
    args = arguments(folder, **{"max_steps": 2, **options})
    return cls(model=model, args=args, train_dataset=data or ids_dataset(), callbacks=list(callbacks))


def sft(model, folder: Path, *callbacks, data=None, **options):
    from trl import SFTConfig, SFTTrainer

    args = arguments(folder, SFTConfig, **{"max_steps": 2, "max_length": 32, "loss_type": "nll", **options})
    return SFTTrainer(
        model,
        args=args,
        train_dataset=data or counting_text(),
        processing_class=word_tokenizer(),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize(
    ("kind", "options"), [("lowbit_sr", {}), ("lrqat", {"weight": 0.3, "temperature": 2.0})], ids=["kl", "mixed"]
)
def test_it_is_the_loss_by_hand(kind, tmp_path, options):
    runs = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        run = trainer(
            KINDS[kind](tiny()),
            tmp_path,
            *([] if by_hand else [Distillation(TEACHER, **options)]),
            cls=ByHand if by_hand else Trainer,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
        )
        run.teacher, run.options = TEACHER, options
        run.model_accepts_loss_kwargs = True
        run.train()
        runs.append(run)
    assert losses(runs[0]) == losses(runs[1])
    same(*(state(run.model) for run in runs))
    if not options:
        logged = [entry for entry in runs[0].state.log_history if "loss" in entry]
        assert [entry["kl"] for entry in logged] == pytest.approx([entry["loss"] for entry in logged], rel=1e-5)


def test_sft_trainer_trains_the_same(tmp_path):
    """TRL reads log-probabilities of single tokens from a forward without logits."""
    found = []
    for make in (sft, trainer):
        torch.manual_seed(0)
        tokenizer = word_tokenizer()
        rows = [tokenizer(text + " </s>")["input_ids"] for text in counting_text()["text"]]
        data = None if make is sft else ids_dataset().from_dict({"input_ids": rows, "labels": rows})
        run = make(adapted(tiny()), tmp_path, Distillation(TEACHER, weight=0.5), data=data)
        run.train()
        found.append([(entry["loss"], entry["kl"]) for entry in run.state.log_history if "kl" in entry])
    torch.testing.assert_close(*map(torch.tensor, found), rtol=1e-4, atol=1e-5)


PROMPTS = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3} w{i + 4}"} for i in range(3, 40)]
VARIANTS = {
    "packing": ("lrqat", {"packing": True, "max_length": 24}),
    "wrapped": ("lowbit_sr", {"packing": True, "packing_strategy": "wrapped", "max_length": 24}),
    "padding_free": ("lowbit_sr", {"padding_free": True, "max_length": None}),
    "completions": ("lrqat", {"completion_only_loss": True}),
    "accumulation": ("lrqat", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "checkpointing": ("lowbit_sr", {"gradient_checkpointing": True}),
    "softcapping": ("gemma2", {}),
    "scaling": ("granite", {}),
    "experts": ("mixtral", {}),
    "autocast": ("lrqat", {"bf16": True}),
    "compiled": ("lrqat", {"torch_compile": True, "torch_compile_backend": "eager"}),
}

SLOW = ("wrapped", "accumulation", "checkpointing", "scaling", "experts", "autocast", "compiled")


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in VARIANTS]
)
def test_only_the_loss_of_a_token_is_new(tmp_path, variant):
    """A teacher without weight changes nothing, and one that is a copy of the student agrees with it, at each token."""
    kind, options = VARIANTS[variant]
    data = Dataset.from_list(PROMPTS) if variant == "completions" else None
    found = []
    for distilled in (False, True):
        torch.manual_seed(0)
        model = PLAIN[kind]() if kind in PLAIN else KINDS[kind](tiny())
        callbacks = [Distillation(copy.deepcopy(model), weight=0.0)] if distilled else []
        run = sft(model, tmp_path, *callbacks, data=data, **{"max_steps": 2, **options})
        run.train()
        found.append(run.state.log_history[:2])
    keys = ("loss", "entropy", "mean_token_accuracy", "grad_norm")
    tolerance = 2e-2 if variant == "autocast" else 1e-4  # there, TRL's own sums are made in bf16
    for key in keys:
        assert [entry[key] for entry in found[1]] == pytest.approx([entry[key] for entry in found[0]], rel=tolerance)
    assert abs(found[1][0]["kl"]) < 1e-6
    assert found[1][1]["kl"] > 1e-6
    assert found[1][1].get("aux_loss") == pytest.approx(found[0][1].get("aux_loss"))


def test_the_model_is_left_as_it_was(tmp_path):
    model = adapted(tiny())
    base = model.get_base_model()
    teacher = tiny(seed=1).train()
    before = (base.loss_function, len(base._forward_hooks), len(base._forward_pre_hooks))
    run = trainer(model, tmp_path, Distillation(teacher))
    run.train()
    assert (base.loss_function, len(base._forward_hooks), len(base._forward_pre_hooks)) == before
    assert teacher.training


def test_evaluation_is_plain(tmp_path):
    """`eval_loss` in the course of training is the next-token loss."""
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=3, max_steps=3)
    data = ids_dataset()
    run = Trainer(adapted(tiny()), args, None, data, data.select(range(4)), callbacks=[Distillation(tiny(seed=1))])
    run.train()
    found = next(entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry)
    assert found == pytest.approx(run.evaluate()["eval_loss"])


def test_data_parallel_is_refused():
    args = SimpleNamespace(label_smoothing_factor=0.0, n_gpu=2)
    with pytest.raises(ValueError, match="accelerate launch"):
        Distillation(TEACHER).on_train_begin(args, None, None, model=tiny())


def test_the_student_comes_closer_to_the_float_model(tmp_path):
    run = trainer(adapted(tiny(), bits=3), tmp_path, Distillation(tiny()), max_steps=16)
    run.train()
    found = [entry["kl"] for entry in run.state.log_history if "kl" in entry]
    assert sum(found[-4:]) < 0.8 * sum(found[:4])
    served_is_trained(run.model, tmp_path)


class _Fails(TrainerCallback):
    """An exception behind the backward of the second step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise RuntimeError("interrupted")


def test_after_an_exception_the_model_has_its_own_loss(tmp_path):
    model = adapted(tiny())
    first = Distillation(tiny(seed=1))
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(model, tmp_path, first, _Fails()).train()
    assert model.get_base_model().loss_function is causal_lm_loss
    ids = tokens()
    model.train()
    found = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(found, causal_lm_loss(model(input_ids=ids).logits, ids, 96))
    trainer(model, tmp_path, Distillation(tiny(seed=1))).train()  # takes the place of the first
    assert not model.get_base_model()._forward_hooks
    first.remove()


class _OwnLoss(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        output = super().forward(input_ids, attention_mask)
        output.loss = output.logits.float().square().mean()
        return output


def _own_loss():
    model = tiny()
    model.__class__ = _OwnLoss
    return model


class _TwoBackwards(Trainer):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs) + super().training_step(*args, **kwargs)


class _Past(Trainer):
    """As a wrapper may, past hooks."""

    def compute_loss(self, model, inputs, num_items_in_batch=None, **kwargs):
        return model.forward(**inputs).loss


class _Twice(Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model, inputs, **kwargs) + super().compute_loss(model, inputs, **kwargs)


def _mean(outputs, labels, num_items_in_batch=None):
    return outputs.logits.float().mean()


def _replaced():
    model = tiny()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    return model


def _dpo(folder: Path) -> Trainer:
    from trl import DPOConfig, DPOTrainer

    preferences = Dataset.from_list([{"prompt": "w3", "chosen": "w4", "rejected": "w5"}] * 4)
    args = arguments(folder, DPOConfig, max_length=16)
    return DPOTrainer(
        adapted(tiny(), group_size=8),
        args=args,
        train_dataset=preferences,
        processing_class=word_tokenizer(),
        callbacks=[Distillation(TEACHER)],
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: trainer(_own_loss(), d, Distillation(TEACHER)), "without the model's `loss_function`"),
        (lambda d: trainer(_replaced(), d, Distillation(TEACHER)), "is not the one of causal language models"),
        (lambda d: trainer(tiny(), d, Distillation(TEACHER), label_smoothing_factor=0.1), "Set it to 0"),
        (lambda d: trainer(tiny(), d, Distillation(TEACHER), cls=_TwoBackwards), "called again"),
        (lambda d: trainer(tiny(), d, Distillation(TEACHER), cls=_Past), "did not call the LlamaForCausalLM"),
        (lambda d: trainer(tiny(), d, Distillation(TEACHER), cls=_Twice), "called again"),
        (lambda d: trainer(tiny(), d, Distillation(TEACHER), Distillation(TEACHER)), "Give it one"),
        (lambda d: trainer(tiny(), d, Distillation(tiny(vocab_size=64))), "64 tokens in its vocabulary"),
        (lambda d: sft(tiny(), d, Distillation(TEACHER), loss_type="dft"), "Use `loss_type='nll'`"),
        (_dpo, "trainer of a DPOConfig has a loss of its own .*sigmoid.*leave it out here"),
        (
            lambda d: Trainer(
                tiny(),
                arguments(d),
                train_dataset=ids_dataset(),
                compute_loss_func=_mean,
                callbacks=[Distillation(TEACHER)],
            ),
            "called without labels",
        ),
    ],
    ids=["own", "replaced", "smoothing", "backwards", "past", "twice", "two", "vocabulary", "dft", "dpo", "loss_func"],
)
def test_what_goes_past_the_loss_is_refused_before_anything_is_trained(tmp_path, make, message):
    run = make(tmp_path)
    before = state(run.model)
    with pytest.raises(ValueError, match=message):
        run.train()
    same(state(run.model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.1}, "`weight` is -0.1"),
        ({"weight": "1"}, "`weight` is '1'; it must be from 0"),
        ({"temperature": 0}, "`temperature` is 0"),
        ({"temperature": "2"}, "`temperature` is '2'; it must be positive"),
        ({"teacher": None}, "`teacher` is None; it must be a model of transformers, its name or folder"),
        ({"teacher": ""}, "`teacher` is ''"),
        ({"teacher": torch.nn.Linear(2, 2)}, "`teacher` is a Linear; it must be a model of transformers"),
        ({"keep": "int4"}, "`keep` is 'int4'"),
        ({"teacher": tiny(), "keep": "int8"}, "given by name"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**{"teacher": "name", **options})


def _distilled(kind: str, teacher, folder: Path, **options):
    run = parallel.trainer(kind, folder / "base", folder / "out", eval_strategy="no", save_strategy="no", **options)
    run.add_callback(Distillation(teacher))
    run.train()
    sharded = all(hasattr(p, "full_tensor") for p in run.model.parameters())
    return {
        **parallel.found(run),
        "sharded": sharded,
        "kl": [entry["kl"] for entry in run.state.log_history if "kl" in entry],
    }


def _in_a_process(rank: int, folder: Path):
    if rank == 0:
        tiny().save_pretrained(folder / "base")
    torch.distributed.barrier()
    results = {kind: _distilled(kind, TEACHER, folder) for kind in KINDS}
    stores = parallel.trainer("lrqat", folder / "base", folder / "out", eval_strategy="no", save_strategy="no")
    store_logits(stores, folder / "logits", TEACHER, k=96, progressbar=False)
    results["stored"] = _distilled("lrqat", folder / "logits", folder)
    if torch.__version__ >= (2, 12):  # below, FSDP2 shards no integers
        parallel.announce(parallel.FSDP2)
        results["fsdp2"] = _distilled("lrqat", TEACHER, folder, use_cpu=False)
        assert results["fsdp2"]["sharded"]
    return results


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    found = parallel.in_two_processes(_in_a_process, tmp_path)
    single = {kind: _distilled(kind, TEACHER, tmp_path) for kind in KINDS}
    assert len(list((tmp_path / "logits").glob("*.safetensors"))) == 2
    for here in found:
        for name, result in here.items():
            expected = single[name if name in KINDS else "lrqat"]
            for key in ("losses", "kl", "norms"):
                assert result[key] == pytest.approx(expected[key], rel=2e-3 if name == "stored" else 1e-5), (name, key)
            if name != "stored":
                for one, tensor in result["adapter"].items():
                    torch.testing.assert_close(
                        tensor, expected["adapter"][one], rtol=1e-5, atol=1e-6, msg=f"{name} {one}"
                    )


def test_a_checkpoint_is_resumed(tmp_path):
    found = []
    for resume in (False, True):
        torch.manual_seed(0)
        run = trainer(low_bit(tiny()), tmp_path, Distillation(TEACHER), save_strategy="steps", save_steps=1)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if resume else None)
        found.append(state(run.model))
        history = [entry["kl"] for entry in run.state.log_history if "kl" in entry]
        assert len(history) == 2
    same(*found)
    served_is_trained(run.model, tmp_path)


def test_what_follows_a_training_that_failed_before_its_forward_is_not_distilled(tmp_path):
    class Fails(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            raise KeyboardInterrupt

    model = adapted(tiny())
    with pytest.raises(KeyboardInterrupt):
        Trainer(model, arguments(tmp_path), None, ids_dataset(), callbacks=[Distillation(TEACHER), Fails()]).train()
    model.train()
    ids = tokens()
    expected = causal_lm_loss(model(input_ids=ids).logits, ids, model.config.vocab_size)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, expected)


def test_what_a_teacher_holds_is_left_alone(tmp_path):
    returned = []

    class Remembers(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            returned.append((output.logits, output.logits.clone()))
            return output

    teacher = Remembers(TEACHER.config).eval()
    Trainer(tiny(), arguments(tmp_path, max_steps=2), None, ids_dataset(), callbacks=[Distillation(teacher)]).train()
    assert len(returned) == 2
    assert all(torch.equal(now, then) for now, then in returned)


def test_models_of_two_parts_and_folders_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="T5ForConditionalGeneration"):
        causal_lm(
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
            )
        )
    run = Trainer(tiny(), arguments(tmp_path), None, ids_dataset(), callbacks=[Distillation(tmp_path)])
    with pytest.raises(ValueError, match="without stored logits"):
        run.train()
    run = Trainer(tiny(), arguments(tmp_path), None, ids_dataset(), callbacks=[Distillation(tmp_path / "logits")])
    with pytest.raises(ValueError, match="is no folder of stored logits"):
        run.train()


class _Tracker(TrainerCallback):
    """Reads the log where TensorBoard's callback does: before the callbacks that a user adds."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_a_tracker_sees_the_kl(tmp_path):
    tracker, began = _Tracker(), _Began()
    run = trainer(tiny(), tmp_path, tracker, Distillation(TEACHER), began)
    run.train()
    assert ["kl" in logs for logs in tracker.seen if "loss" in logs] == [True, True]
    assert began.times == 1


class _Began(TrainerCallback):
    times = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.times += 1


class _TrainsInside(TrainerCallback):
    def __init__(self, make):
        self.make = make

    def on_step_end(self, args, state, control, **kwargs):
        self.make().train()


def test_one_callback_in_a_training_inside_another_is_refused(tmp_path):
    teach = Distillation(TEACHER)
    inner = _TrainsInside(lambda: trainer(tiny(), tmp_path / "inner", teach))
    with pytest.raises(ValueError, match="Give each its own"):
        trainer(tiny(), tmp_path, teach, inner).train()


def test_padding_on_the_left_takes_nothing_from_the_loss(tmp_path):
    """Trainer divides by the first tokens too, which only padding would predict."""
    rows = [[3 + (i + j) % 40 for j in range(4 + i % 7)] for i in range(8)]
    left = {
        "input_ids": [[0] * (10 - len(row)) + row for row in rows],
        "attention_mask": [[0] * (10 - len(row)) + [1] * len(row) for row in rows],
        "labels": [[-100] * (10 - len(row)) + row for row in rows],
    }
    run = Trainer(
        tiny(),
        arguments(tmp_path, max_steps=1, per_device_train_batch_size=8),
        None,
        Dataset.from_dict(left),
        callbacks=[Distillation(TEACHER)],
    )
    run.train()
    (entry,) = (entry for entry in run.state.log_history if "kl" in entry)
    assert entry["loss"] == pytest.approx(entry["kl"], abs=1e-4)
