"""The callback and the context, with a recorder for CPUs."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from peft_lrqat import (
    CudaGraphCallback,
    LowBitAdamW,
    LowBitSRConfig,
    LRQATConfig,
    QuantizationCallback,
    cuda_graphs,
)
from peft_lrqat.modules import block_graphs
from tests.graphs import RunsAgain
from tests.lowbit_sr import integers
from tests.models import adapted, tiny, tokens
from tests.trainer import arguments, counting_text, ids_dataset, losses, word_tokenizer


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(block_graphs, "recorder_for", lambda device: RunsAgain())


class Looks(TrainerCallback):
    """What the graphs of another callback have counted, at each step."""

    def __init__(self, other: CudaGraphCallback) -> None:
        self.other, self.counts = other, []

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(dict(self.other._graphs.counts))


def sentences():
    """Of many lengths, so that packed rows are not full."""
    return Dataset.from_dict({"text": [" ".join(f"w{3 + (i + j) % 40}" for j in range(3 + i % 9)) for i in range(96)]})


def sft(folder, callbacks, model=None, config=None, optimizer=None, resume=None, **options):
    torch.manual_seed(0)
    settings = {"max_length": 32, "gradient_accumulation_steps": 2, "max_steps": 3, **options}
    config = config or LRQATConfig(task_type="CAUSAL_LM", group_size=-1, r=4, range_method="minmax")
    args = arguments(folder, SFTConfig, **settings)
    trainer = SFTTrainer(
        model or tiny(),
        args,
        train_dataset=sentences() if options.get("packing") else counting_text(),
        eval_dataset=counting_text(),
        processing_class=word_tokenizer(),
        peft_config=None if isinstance(model, PeftModel) else config,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=None if optimizer is None else optimizer(args),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    "options",
    [{"packing": True, "packing_strategy": "wrapped", "bf16": True}, {"eval_strategy": "steps", "eval_steps": 1}],
    ids=["packed", "evaluated"],
)
def test_one_line_of_a_script(options, tmp_path):
    expected = sft(tmp_path / "without", [], **options)
    graphs = CudaGraphCallback()
    looks = Looks(graphs)
    found = sft(tmp_path / "with", [graphs, looks, QuantizationCallback(plot=False)], **options)
    assert losses(found) == losses(expected)
    kept = ("eval_loss", "grad_norm")
    for name in kept:
        logged = [[entry[name] for entry in t.state.log_history if name in entry] for t in (found, expected)]
        assert logged[0] == logged[1]
    assert graphs._graphs is None
    trained = [{n: p for n, p in t.model.named_parameters() if p.requires_grad} for t in (found, expected)]
    assert all(torch.equal(p, trained[1][name]) for name, p in trained[0].items())
    assert looks.counts[-1]["replayed"] >= 8
    layers = [m for m in found.model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    assert not any(isinstance(m._gradient_checkpointing_func, block_graphs._Block) for m in layers)


@pytest.mark.parametrize("optimizer", [None, LowBitAdamW.for_trainer], ids=["AdamW", "in backward"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_low_bit_sr_through_a_trainer(base, optimizer, tmp_path):
    """With gradients that accumulate, evaluations, and, for a float model, autocast."""
    runs, counts = [], []
    for callbacks in ([], [CudaGraphCallback()]):
        config = LowBitSRConfig(task_type="CAUSAL_LM", bits=4, group_size=16, range_method="minmax")
        looks = [Looks(callbacks[0])] if callbacks else []
        options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 4, "bf16": base == torch.float32}
        model = tiny(dtype=base)
        trainer = sft(tmp_path / str(len(callbacks)), [*callbacks, *looks], model, config, optimizer, **options)
        logged = [[e[name] for e in trainer.state.log_history if name in e] for name in ("eval_loss", "grad_norm")]
        runs.append((losses(trainer), logged, integers(trainer.model)))
        counts += [one.counts[-1] for one in looks]
    assert runs[0][:2] == runs[1][:2]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][2], runs[1][2], strict=True))
    assert counts == [{"recorded": 2, "replayed": 14, "ordinary": 2}]


def test_low_bit_sr_goes_on_from_a_checkpoint(tmp_path):
    runs = []
    for callbacks in ([], [CudaGraphCallback()]):
        folder = tmp_path / str(len(callbacks))

        def go_on(resume=None, folder=folder, callbacks=callbacks):
            config = LowBitSRConfig(task_type="CAUSAL_LM", bits=4, range_method="minmax", group_size=-1)
            options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 1}
            return sft(folder, callbacks, tiny(), config, LowBitAdamW.for_trainer, resume, **options)

        whole = integers(go_on().model)
        resumed = go_on(folder / "checkpoint-2")
        assert all(torch.equal(a, b) for a, b in zip(integers(resumed.model), whole, strict=True))
        runs.append([*whole, torch.tensor(losses(resumed))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_after_training_nobody_holds_the_model(tmp_path):
    trainer = sft(tmp_path, [CudaGraphCallback()])
    held = [weakref.ref(trainer.model), *map(weakref.ref, trainer.model.parameters())]
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    assert [ref() for ref in held if ref() is not None] == []


def test_a_saved_adapter_trains_on(tmp_path):
    def run(callbacks):
        folder = tmp_path / str(len(callbacks))
        first = sft(folder, callbacks, max_steps=2)
        first.save_model(folder / "adapter")
        model = PeftModel.from_pretrained(tiny(), folder / "adapter", is_trainable=True)
        return [*losses(first), *losses(sft(folder, callbacks, model, max_steps=2))]

    assert run([CudaGraphCallback()]) == run([])


def test_trainers_that_switch_checkpointing_between_steps(tmp_path):
    class Generates(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.gradient_checkpointing_disable()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    graphs = CudaGraphCallback()
    looks = Looks(graphs)
    sft(tmp_path, [graphs, looks, Generates()], max_steps=4)
    assert [counts["replayed"] for counts in looks.counts] == [2, 6, 10, 14]


def test_a_training_that_failed_leaves_the_next_one_alone(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyError("stopped")

    model = get_peft_model(tiny(), LoraConfig(target_modules="all-linear"))
    graphs = CudaGraphCallback()
    with pytest.raises(KeyError, match="stopped"):
        sft(tmp_path, [graphs, Fails()], model)
    looks = Looks(graphs)
    sft(tmp_path, [graphs, looks], model)
    assert looks.counts[-1]["replayed"] == 10


def test_a_loop_of_ones_own():
    def run(model, graphs):
        found = []
        with cuda_graphs(model) if graphs else torch.enable_grad():
            for _ in range(3):
                loss = model(input_ids=tokens(), labels=tokens()).loss
                loss.backward()
                found.append(loss.detach())
        return [*found, *[p.grad for p in model.parameters() if p.grad is not None]]

    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(adapted(tiny(), range_method="minmax").train())
        models[-1].gradient_checkpointing_enable()
    expected, found = (run(model, graphs) for model, graphs in zip(models, (False, True), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    layer = models[1].get_base_model().model.layers[0]
    assert layer._gradient_checkpointing_func.func is torch.utils.checkpoint.checkpoint


def test_without_a_gpu_training_goes_on_and_a_warning_says_so(tmp_path, monkeypatch):
    monkeypatch.undo()
    found = []
    monkeypatch.setattr(block_graphs.logger, "warning", found.append)
    graphs = CudaGraphCallback()
    looks = Looks(graphs)
    sft(tmp_path, [graphs, looks], max_steps=1)
    assert looks.counts[-1] == {"recorded": 0, "replayed": 0, "ordinary": 0}
    assert "on cpu" in found[0]


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: adapted(tiny()), {"gradient_checkpointing": False}, "gradient checkpointing is off"),
        (lambda: adapted(tiny(), offload_base=True), {}, "offload_base=True"),
        (lambda: get_peft_model(tiny(), LoraConfig(lora_dropout=0.1)), {}, "p=0.1"),
    ],
    ids=["no checkpointing", "offloaded", "dropout"],
)
def test_what_does_not_go_with_graphs_is_refused_before_a_step(make, options, words, tmp_path):
    args = arguments(tmp_path, **{"gradient_checkpointing": True, **options})
    trainer = Trainer(make(), args, None, ids_dataset(), callbacks=[CudaGraphCallback()])
    with pytest.raises(ValueError, match=words):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [({"n_gpu": 2}, "nn.DataParallel"), ({"torch_compile": True}, "torch_compile")],
    ids=["several GPUs", "compiled"],
)
def test_arguments_that_do_not_go_with_graphs(change, words):
    args = SimpleNamespace(**{"n_gpu": 1, "torch_compile": False, **change})
    with pytest.raises(ValueError, match=words):
        CudaGraphCallback().on_train_begin(args, None, None, model=adapted(tiny(), range_method="minmax"))


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match="`model` is 'a name'; it must be a model of transformers"):
        cuda_graphs("a name").__enter__()


@pytest.mark.parametrize("way", ["FSDP", "DEEPSPEED"])
def test_sharded_training_is_refused(way, monkeypatch):
    model = get_peft_model(tiny(), LoraConfig(target_modules="all-linear"))
    monkeypatch.setattr("peft_lrqat.graphs.announced_fsdp", lambda: 2 if way == "FSDP" else None)
    monkeypatch.setattr("peft_lrqat.graphs.announced_zero", lambda: 0 if way == "DEEPSPEED" else None)
    with pytest.raises(ValueError, match="FSDP and DeepSpeed"), cuda_graphs(model):
        pass
