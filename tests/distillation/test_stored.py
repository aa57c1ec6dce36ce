import json

import pytest
import torch
from datasets import Dataset
from transformers import Trainer

from peft_lrqat import Distillation, store_logits
from peft_lrqat.distillation import stored
from peft_lrqat.distillation.segments import check_positions
from peft_lrqat.distillation.teacher import ModelTeacher
from tests.models import VOCAB, adapted, low_bit, tiny
from tests.trainer import arguments, counting_text, ids_dataset, word_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TEACHER = tiny(seed=1)
KINDS = {"lrqat": adapted, "lowbit_sr": low_bit}
PROMPTS = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3} w{i + 4}"} for i in range(3, 40)]


def sft(model, folder, *callbacks, data=None, **options):
    from trl import SFTConfig, SFTTrainer

    args = arguments(folder, SFTConfig, **{"max_steps": 2, "max_length": 24, "loss_type": "nll", **options})
    data = data or counting_text()
    return SFTTrainer(model, args, None, data, processing_class=word_tokenizer(), callbacks=list(callbacks))


def plain(folder, *callbacks, rows=None, model=None):
    from transformers import Trainer

    data = ids_dataset() if rows is None else ids_dataset().select(range(rows))
    return Trainer(model or tiny(), arguments(folder, max_steps=2), None, data, callbacks=list(callbacks))


def store(folder, *, rows=None, teacher=TEACHER, **options):
    store_logits(plain(folder, rows=rows), folder / "logits", teacher, **{"progressbar": False, "k": 8, **options})
    return folder / "logits"


def logged(run):
    return [entry["kl"] for entry in run.state.log_history if "kl" in entry]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("lrqat", {"packing": True}, marks=pytest.mark.slow),
        ("lowbit_sr", {"padding_free": True, "max_length": None, "gradient_accumulation_steps": 2}),
        ("lrqat", {"completion_only_loss": True, "num_train_epochs": 1, "per_device_train_batch_size": 3}),
    ],
    ids=["packing", "padding_free", "completions"],
)
def test_all_of_the_vocabulary_is_the_teacher_itself(tmp_path, kind, options):
    """Stored from batches of one order, read in those of another."""
    data = Dataset.from_list(PROMPTS) if "completion_only_loss" in options else None
    writing = {**options, "seed": 7, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 1}
    store_logits(sft(tiny(), tmp_path, data=data, **writing), tmp_path / "logits", TEACHER, k=VOCAB, progressbar=False)
    found = []
    for teacher in (TEACHER, tmp_path / "logits"):
        torch.manual_seed(0)
        run = sft(KINDS[kind](tiny()), tmp_path, Distillation(teacher), data=data, **options)
        run.train()
        found.append(torch.tensor([[entry["loss"], entry["kl"]] for entry in run.state.log_history if "kl" in entry]))
    torch.testing.assert_close(*found, rtol=2e-3, atol=1e-5)


def test_it_is_read_under_autocast(tmp_path):
    callback = Distillation(store(tmp_path))
    args = arguments(tmp_path, max_steps=1, bf16=True)
    run = Trainer(adapted(tiny()), args, None, ids_dataset(), callbacks=[callback])
    run.train()
    assert logged(run)[0] > 0


def test_writing_leaves_the_order_of_training_alone(tmp_path):
    found = []
    for first in (False, True):
        torch.manual_seed(0)
        run = plain(tmp_path, Distillation(tmp_path / "logits"), model=tiny())
        if first or not found:
            store_logits(run, tmp_path / "logits", TEACHER, k=8, progressbar=False)
        if not first:
            torch.manual_seed(0)
            run = plain(tmp_path, Distillation(tmp_path / "logits"), model=tiny())
        run.train()
        found.append(logged(run))
    assert found[0] == found[1]


def test_it_goes_on_where_it_was(tmp_path, monkeypatch):
    asked = []
    ask = ModelTeacher.targets
    monkeypatch.setattr(
        ModelTeacher, "targets", lambda self, inputs, labels: asked.append(1) or ask(self, inputs, labels)
    )
    monkeypatch.setattr(stored, "write_atomically", _fails_to_complete(stored.write_atomically))
    with pytest.raises(RuntimeError, match="killed"):
        store(tmp_path, shard_tokens=50)
    assert len(asked) == 8
    with pytest.raises(ValueError, match="not complete"):
        plain(tmp_path, Distillation(tmp_path / "logits")).train()
    (tmp_path / "logits" / "000-00001.safetensors").unlink()
    monkeypatch.undo()
    monkeypatch.setattr(
        ModelTeacher, "targets", lambda self, inputs, labels: asked.append(1) or ask(self, inputs, labels)
    )
    store(tmp_path, shard_tokens=50)
    assert 8 < len(asked) < 16
    plain(tmp_path, Distillation(tmp_path / "logits")).train()


def _fails_to_complete(write):
    def fails(path, text):
        if json.loads(text)["complete"]:
            raise RuntimeError("killed")
        write(path, text)

    return fails


def test_a_sequence_that_is_not_there(tmp_path):
    folder = store(tmp_path, rows=8)
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = plain(tmp_path, Distillation(folder), model=model)
    with pytest.raises(ValueError, match="Call `store_logits` with this Trainer"):
        run.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    store(tmp_path)
    run.train()
    assert len(logged(run)) == 2


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="`trainer` is a LlamaForCausalLM; it must be the Trainer"):
        store_logits(tiny(), tmp_path / "logits", tiny(seed=1))
    for given, message in [
        ({"folder": 5}, "`folder` is 5; it must be the path of a folder"),
        ({"teacher": str(tmp_path / "nowhere")}, "The teacher '.*nowhere' .* could not be loaded as a model"),
    ]:
        with pytest.raises(ValueError, match=message):
            store_logits(plain(tmp_path), **{"folder": tmp_path / "logits", "teacher": TEACHER, **given})
    assert not (tmp_path / "logits").exists()
    folder = store(tmp_path, rows=4)
    for options, message in [
        ({"temperature": 2.0}, "stored at the temperature 1.0"),
        ({"keep": "int8"}, "for a model"),
    ]:
        with pytest.raises(ValueError, match=message):
            plain(tmp_path, Distillation(folder, **options)).train()
    with pytest.raises(ValueError, match="vocabulary of 96 tokens"):
        plain(tmp_path, Distillation(folder), model=tiny(vocab_size=128)).train()
    for options, message in [
        ({"k": 4}, "k: 8 there, 4 here"),
        ({"teacher": tiny()}, "checksum"),
        ({"k": 97}, "`k` is"),
    ]:
        with pytest.raises(ValueError, match=message):
            store(tmp_path, rows=4, **options)
    run = plain(tmp_path)
    run.train_dataset = run.train_dataset.remove_columns("labels")
    with pytest.raises(ValueError, match="no `labels`"):
        store_logits(run, tmp_path / "unlabelled", TEACHER, progressbar=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="holds something else"):
        store_logits(plain(tmp_path), tmp_path / "other", TEACHER, progressbar=False)
    next(folder.glob("*.safetensors")).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        plain(tmp_path, Distillation(folder)).train()


def test_the_rows_that_an_epoch_drops_are_stored(tmp_path):
    """Each epoch drops others."""
    dropping = {"dataloader_drop_last": True, "per_device_train_batch_size": 5, "max_steps": 12}
    run = Trainer(tiny(), arguments(tmp_path, **dropping), None, ids_dataset())
    store_logits(run, tmp_path / "logits", TEACHER, k=8, progressbar=False)
    assert run.args.dataloader_drop_last
    run.add_callback(Distillation(tmp_path / "logits"))
    run.train()
    assert run.state.epoch >= 2


def test_positions_that_count_padding_are_refused_on_the_left(tmp_path):
    inputs = {"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    with pytest.raises(ValueError, match="Pad on the right"):
        check_positions(tiny("gpt2"), inputs)
    check_positions(tiny("gpt2"), {**inputs, "attention_mask": torch.tensor([[1, 1, 0]])})
    check_positions(tiny(), inputs)
