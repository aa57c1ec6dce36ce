"""Files that a stranger wrote, or a disk damaged: a ValueError that names the folder, in little time and memory."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peft_lrqat import export
from peft_lrqat.checkpoint.damage import check_counts, naming
from peft_lrqat.checkpoint.inspect import inspect
from peft_lrqat.checkpoint.open import open_source
from peft_lrqat.grid import Grid
from tests.grids import on_grid
from tests.models import adapted, tiny

_FORMATS = ("compressed-tensors", "gptq", "torchao", "gguf", "shards")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder for each of `_FORMATS`."""
    work, model = tmp_path_factory.mktemp("made"), on_grid(Grid(4, 32))
    for format in _FORMATS[:3]:
        export(model, work / format, format, progress=False)
    export(model, work / "gguf", "gguf", vocabulary=False, progress=False)
    export(model, work / "shards", max_shard_size="10KB", progress=False)
    return work


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A compressed-tensors folder to damage."""
    return shutil.copytree(made / "compressed-tensors", tmp_path / "a [b] folder")


def refused(folder: Path) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        inspect(folder)
    assert folder.name in str(error.value)
    return str(error.value)


# -- anything at all


_VALUES = [None, True, -1, 0, 1, 3, 10**6, 10**12, 2**63, -(10**12), 1e308, float("nan"), float("inf"), "", "x", "int4",
           "\ud800", "a" * 1000, [], {}, [[]], {"a": 1}]  # fmt: skip


def change_json(text: bytes, chance: random.Random) -> bytes:
    places: list[tuple] = []
    waiting = [top := json.loads(text)]
    while waiting:
        inside = waiting.pop()
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        places += [(inside, key) for key in keys]
        waiting += [inside[key] for key in keys if isinstance(inside[key], dict | list)]
    inside, key = chance.choice(places)
    if chance.random() < 0.2:
        del inside[key]
    else:
        inside[key] = chance.choice(_VALUES)
    return json.dumps(top).encode()


def change_header(data: bytes, chance: random.Random) -> bytes:
    """A header that safetensors itself takes: another dtype, another shape of as many elements, another name."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    name = chance.choice(sorted(header.keys() - {"__metadata__"}))
    entry, metadata = header[name], header["__metadata__"]
    what = chance.randrange(4)
    if what == 0:
        count = torch.Size(entry["shape"]).numel()
        entry["shape"] = chance.choice([[count], [1, count], [count, 1], [count, 1, 1]])
    elif what == 1:
        alike = [["BF16", "F16", "I16", "U16"], ["F32", "I32", "U32"], ["I64", "F64"], ["I8", "U8", "BOOL", "F8_E4M3"]]
        entry["dtype"] = chance.choice(next(names for names in alike if entry["dtype"] in names))
    elif what == 2:
        header[chance.choice(["x", f"{name}.y", "\x1b[31m", "lm_head.qweight"])] = header.pop(name)
    elif name in metadata:
        metadata[name] = change_json(metadata[name].encode(), chance).decode()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def change_bytes(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(min(len(data), 4000))
    width = chance.choice([1, 4, 8])
    other = chance.choice([b"\xff" * width, b"\0" * width, chance.randbytes(width)])
    return chance.choice([data[:at], data[:at] + other + data[at:], data[:at] + other + data[at + width :]])


@pytest.mark.parametrize("format", _FORMATS)
def test_whatever_is_changed_it_is_read_or_refused(format: str, made: Path, tmp_path: Path):
    """Nothing but a ValueError, however far a change gets; a few hundred changes, the same ones each time."""
    folder = shutil.copytree(made / format, tmp_path / "changed folder")
    names = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".json", ".safetensors", ".gguf")]
    chance, changes, refusals = random.Random(0), 24, []
    for _ in range(changes):
        path = folder / chance.choice(names)
        whole = path.read_bytes()
        ways: list[Callable] = {".json": [change_json], ".safetensors": [change_header]}.get(path.suffix, [])
        path.write_bytes(chance.choice([*ways, *ways, change_bytes])(whole, chance))
        try:
            inspect(folder)
        except ValueError as error:
            refusals.append(str(error))
        path.write_bytes(whole)
    assert 3 < len(refusals) < changes - 3
    assert all(folder.name in said for said in refusals)
    inspect(folder)


@pytest.mark.parametrize(("format", "name"), [
    ("shards", "config.json"),
    ("shards", "model.safetensors.index.json"),
    ("compressed-tensors", "model.safetensors"),
    ("gguf", ""),
])  # fmt: skip
@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_a_file_that_ends_anywhere(format: str, name: str, step: int, made: Path, tmp_path: Path):
    folder = shutil.copytree(made / format, tmp_path / "cut")
    path = folder / name if name else next(folder.glob("*.gguf"))
    whole = path.read_bytes()
    for length in [*range(0, min(len(whole), 5000), step), *range(5000, len(whole), 997 * step), len(whole) - 1]:
        path.write_bytes(whole[:length])
        if whole[length:].strip():
            refused(folder)


# -- files made for harm


def config(**entries) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**described, **entries}))

    return change


def pattern(target: str) -> Callable[[Path], None]:
    """All layers are named by this regular expression."""

    def change(folder: Path) -> None:
        described = json.loads((folder / "config.json").read_text())
        for group in described["quantization_config"]["config_groups"].values():
            group["targets"] = [f"re:{target}"]
        (folder / "config.json").write_text(json.dumps(described))

    return change


def file(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def index(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
        names = {"weight_map": {"a": name.format(folder.parent)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(names))

    return change


def header(text: str, data: bytes = b"", length: int | None = None) -> Callable[[Path], None]:
    stored = (len(text) if length is None else length).to_bytes(8, "little") + text.encode() + data
    return file("model.safetensors", lambda path: path.write_bytes(stored))


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**8)  # takes no room on the disk


_TENSOR = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
_HARM = {
    "many layers": (config(num_hidden_layers=10**9), "`num_hidden_layers` is 1000000000"),
    "many labels": (config(num_labels=10**8), "`num_labels` is"),
    "many inner layers": (config(text_config={"encoder_layers": [2, 10**9]}), "`encoder_layers` is"),
    "no such model": (config(model_type="x"), "model type `x`"),
    "a pattern that takes for ever": (pattern("(.|..|...|....)*(?<=Z)"), "takes for ever"),
    "a pattern that is none": (pattern("("), "is none"),
    "a large config": (file("config.json", large), "has 100000000 bytes"),
    "a deep config": (file("config.json", lambda path: path.write_text('{"a":' * 10**5)), "damaged"),
    "a key twice": (file("config.json", lambda path: path.write_text('{"a": 1, "a": 2}')), "twice"),
    "a pipe": (file("config.json", os.mkfifo), "no regular file"),
    "a folder": (file("model.safetensors", Path.mkdir), "no regular file"),
    "a device": (file("model.safetensors", lambda path: path.symlink_to("/dev/zero")), "no regular file"),
    "a pipe of weights": (file("model.safetensors", os.mkfifo), "no regular file"),
    "another folder's file": (index("../model.safetensors"), "outside of its folder"),
    "a file anywhere": (index("{}/model.safetensors"), "outside of its folder"),
    "an endless header": (header("{}", length=2**63), "truncated or damaged"),
    "a header of the file's length": (header("{" * 100), "truncated or damaged"),
    "bytes that overlap": (header("{" + _TENSOR + "," + _TENSOR.replace("a", "b") + "}", b"x"), "truncated or damaged"),
    "a tensor twice": (header("{" + _TENSOR + "," + _TENSOR + "}", b"x"), "twice"),
    "an empty tensor": (
        header('{"lm_head.weight_packed":{"dtype":"I32","shape":[1000000000000,0],"data_offsets":[0,0]}}'),
        "cannot be read from",
    ),
}


@pytest.mark.parametrize("harm", _HARM)
def test_harm(harm: str, folder: Path):
    change, said = _HARM[harm]
    change(folder)
    assert said in refused(folder)


def test_more_layers_than_files_hold():
    check_counts({"num_hidden_layers": 5000, "vocab_size": 10**6, "attn": {"block_size": 10**6}}, 60_000)
    check_counts({"num_labels": 21_841, "label2id": {"headphones": 21_840}, "max_position_embeddings": 10**6}, 70)
    with pytest.raises(ValueError, match=r"`n_layer` is 5000, but the files hold 70 tensors"):
        check_counts({"a": [{"n_layer": 5000}]}, 70)


@pytest.mark.parametrize("where", ["adapter", "base"])
def test_pickles_are_not_run(where: str, tmp_path: Path):
    """An adapter, and the base that it names, may be pickles; what such a one would run, is not."""
    base = tiny(num_hidden_layers=1)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    adapted(base, range_method="minmax").save_pretrained(tmp_path / "adapter")
    whole, harmful = {"adapter": ("adapter_model.safetensors", "adapter_model.bin"),
                      "base": ("model.safetensors", "pytorch_model.bin")}[where]  # fmt: skip
    (tmp_path / where / whole).unlink()

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it was run"),)

    torch.save({"a": Harm()}, tmp_path / where / harmful)
    assert "holds a pickle, which can run code" in refused(tmp_path / "adapter")
    assert not (tmp_path / "it was run").exists()


def test_an_adapters_configuration_is_read_with_care(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LRQAT", "peft_type": "LORA"}')
    assert "twice" in refused(tmp_path)


@pytest.mark.parametrize(("raised", "seen"), [
    (ValueError("bad"), "'a/b': bad"),
    (ValueError("b: bad"), "b: bad"),
    (ValueError("'a/b/c.json' is bad"), "'a/b/c.json' is bad"),
    (OSError("bad"), "'a/b': bad"),
    (OSError("'a/b/c.json' is bad"), "'a/b/c.json' is bad"),
    (KeyError("c"), "(KeyError: 'c')"),
    (MemoryError(), "(MemoryError: )"),
    (RecursionError("deep"), "RecursionError"),
    (pickle.UnpicklingError("set weights_only=False"), "safetensors"),
])  # fmt: skip
def test_whatever_is_raised_becomes_a_sentence_that_names_the_folder(raised: Exception, seen: str):
    with pytest.raises(ValueError, match=r".") as error, naming(Path("a/b")):
        raise raised
    assert seen in str(error.value)


@pytest.mark.parametrize("raised", [FileNotFoundError(2, "No such file", "a"), ModuleNotFoundError("a")])
def test_what_is_missing_is_said_as_it_is(raised: Exception):
    with pytest.raises(type(raised)), naming(Path("a/b")):
        raise raised


def test_layers_are_read_with_care_too(folder: Path):
    """A file that changes while it is open."""
    source = open_source(folder)
    (folder / "model.safetensors").write_bytes(b"")
    for read in (source.layer, source.scale):
        with pytest.raises(ValueError, match=r"model\.safetensors': "):
            read("model.layers.0.mlp.up_proj")
