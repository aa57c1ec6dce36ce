"""What is no whole GGUF file is refused, and takes no more time and memory than its bytes."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import pytest

from peft_lrqat import export
from peft_lrqat.checkpoint.inspect import inspect
from peft_lrqat.formats.gguf import reader
from peft_lrqat.formats.gguf.reader import GGUFFile
from peft_lrqat.formats.gguf.writer import GRID_KEY, LAYERS_KEY
from tests.grids import adapted_for_gguf

_HUGE = 2**63


def test_a_truncated_file_is_refused(tmp_path):
    export(adapted_for_gguf(), tmp_path / "out", format="gguf", vocabulary=False, progress=False)
    path = next((tmp_path / "out").glob("*.gguf"))
    whole = path.read_bytes()
    for length in (3, 20, 400, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"GGUF file|truncated"):
            GGUFFile(path)


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, length: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + values


def tensor(name: str, shape: tuple[int, ...], kind: int = 2, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(entries: list[bytes], tensors: list[bytes] = (), data: int = 64, **counts: int) -> bytes:
    """A file of version 3; `pairs` and `tensors` may be said to be others than they are."""
    numbers = (counts.get("count", len(tensors)), counts.get("pairs", len(entries)))
    header = b"GGUF" + struct.pack("<IQQ", 3, *numbers) + b"".join([*entries, *tensors])
    return header + b"\0" * (-len(header) % 32 + data)


LAYERS = entry(LAYERS_KEY, 9, array(8, 1, string("a")))
GRID = entry(GRID_KEY, 9, array(6, 3, struct.pack("<3f", 4, 32, 1)))
Q4_0 = tensor("a", (32, 2))  # 36 bytes

_HARM = {
    "as many keys as there are numbers": gguf([], pairs=_HUGE),
    "as many tensors": gguf([], count=_HUGE),
    "a long key": gguf([string("a", _HUGE)]),
    "a long text": gguf([entry("a", 8, string("", _HUGE))]),
    "a long list of bytes": gguf([entry("a", 9, array(0, _HUGE))]),
    "a list of as many texts as bytes": gguf([entry("a", 9, array(8, 60_000))], data=60_000),
    "a list of lists without end": gguf([entry("a", 9, array(9, 1) * 5000)]),
    "many empty lists": gguf([entry("a", 9, array(9, _HUGE))]),
    "a kind that is none": gguf([entry("a", 13, b"")]),
    "no text": gguf([entry("a", 8, string(b"\xff"))]),
    "a key twice": gguf([GRID, GRID]),
    "many dimensions": gguf([], [string("a") + struct.pack("<I", 2**32 - 1)]),
    "no dimension": gguf([], [tensor("a", ())]),
    "no rows": gguf([], [tensor("a", (32, 0))]),
    "part of a block": gguf([], [tensor("a", (33, 2))]),
    "large dimensions": gguf([], [tensor("a", (_HUGE, _HUGE, _HUGE, 32))]),
    "beyond the end": gguf([], [tensor("a", (32, 2), offset=_HUGE)]),
    "a tensor twice": gguf([], [Q4_0, Q4_0]),
    "bytes that two share": gguf([], [Q4_0, tensor("b", (32, 1), offset=18)]),
    "a type that is none": gguf([], [tensor("a", (32, 2), kind=99)]),
    "an alignment of nothing": gguf([entry("general.alignment", 4, struct.pack("<I", 0))], [Q4_0]),
    "an alignment that is a text": gguf([entry("general.alignment", 8, string("32"))], [Q4_0]),
    "no file": b"",
    "layers that are not there": gguf([LAYERS, GRID]),
    "layers that are numbers": gguf([entry(LAYERS_KEY, 9, array(0, 1, b"a")), GRID], [Q4_0]),
    "a layer twice": gguf([entry(LAYERS_KEY, 9, array(8, 2, string("a") * 2)), GRID], [Q4_0]),
    "a layer of one dimension": gguf([LAYERS, GRID], [tensor("a", (64,))]),
    "layers that are no list": gguf([entry(LAYERS_KEY, 0, b"a"), GRID], [Q4_0]),
    "no grid": gguf([LAYERS], [Q4_0]),
    "a grid of two numbers": gguf([LAYERS, entry(GRID_KEY, 9, array(6, 2, b"\0" * 8))], [Q4_0]),
    "a grid that is none": gguf([LAYERS, entry(GRID_KEY, 9, array(6, 3, b"\xff" * 12))], [Q4_0]),
    "a grid of texts": gguf([LAYERS, entry(GRID_KEY, 9, array(8, 3, string("4") * 3))], [Q4_0]),
}


@pytest.mark.parametrize("harm", _HARM)
def test_harm(harm: str, tmp_path: Path):
    """Files of some bytes, which say what would take years or all memory."""
    path = tmp_path / "harm.gguf"
    path.write_bytes(_HARM[harm])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"harm\.gguf"):
            inspect(path)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_what_harm_was_made_of_is_read(tmp_path: Path):
    path = tmp_path / "a.gguf"
    nested = entry("nested", 9, array(9, 2, array(8, 1, string("x")) + array(0, 2, b"\1\2")))
    path.write_bytes(gguf([LAYERS, GRID, nested], [Q4_0]))
    file = GGUFFile(path)
    assert file.metadata["nested"] == [["x"], [1, 2]]
    assert file.tensors["a"].shape == (2, 32)
    assert inspect(path).weights == 64


def test_scales_that_are_no_numbers(tmp_path: Path):
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf([LAYERS, GRID], [Q4_0], data=0) + b"\xff" * 36)
    with pytest.raises(ValueError, match=r"a\.gguf.*infinite or NaN"):
        inspect(path)


def test_a_header_has_an_end(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(reader, "_LONGEST_HEADER", 1000)
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf([entry("a", 9, array(0, 2000, b"a" * 2000))]))
    with pytest.raises(ValueError, match="do not fit"):
        GGUFFile(path)


def test_what_is_no_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ValueError, match="no regular file"):
        inspect(tmp_path / "pipe.gguf")
    with pytest.raises(ValueError, match=r"holds neither config\.json"):
        inspect(tmp_path / "folder.gguf")
