"""What a GGUF file holds, read from its header.

The package `gguf` has a reader too, which refuses a whole file for one tensor of a type that it does not know, as
version 0.19 does with Q2_0.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .blocks import BLOCK_TYPES

#: ggml's id -> (name, weights in a block, bytes of a block), of every type that this package writes.
TYPES: dict[int, tuple[str, int, int]] = {
    **{kind.number: (kind.name, kind.size, kind.bytes) for kind in BLOCK_TYPES.values()},
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    30: ("bf16", 1, 2),
}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file.

    Attributes:
        type: name of the type, such as "q4_0" or "f32".
        shape: as PyTorch counts, (out, in) or (n,).
        offset: in the file, bytes.
    """

    type: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


class GGUFFile:
    """A GGUF file, opened for reading.

    Attributes:
        metadata: key -> value.
        tensors: name -> where it is.

    Raises:
        ValueError: it is no GGUF file of version 2 or 3, is truncated, or has tensors of other types than `TYPES`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        with path.open("rb") as file:
            try:
                self._read(file)
            except (struct.error, UnicodeDecodeError, MemoryError, OverflowError) as error:
                raise ValueError(f"{str(path)!r} is truncated or damaged ({error}).") from error
        end = max((tensor.offset + tensor.bytes for tensor in self.tensors.values()), default=0)
        if path.stat().st_size < end:
            raise ValueError(f"{str(path)!r} is truncated: it should have {end} bytes.")

    def _read(self, file: BinaryIO) -> None:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{str(self.path)!r} is no GGUF file.")
        version, count, pairs = _take(file, "IQQ")
        if version not in (2, 3):
            raise ValueError(f"{str(self.path)!r} is GGUF version {version}; 2 and 3 can be read.")
        for _ in range(pairs):
            key = _string(file)
            self.metadata[key] = _value(file, *_take(file, "I"))
        infos = []
        for _ in range(count):
            name = _string(file)
            shape = _take(file, "Q" * _take(file, "I")[0])[::-1]
            infos.append((name, shape, *_take(file, "IQ")))
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        start = -(-file.tell() // alignment) * alignment
        for name, shape, number, offset in infos:
            if number not in TYPES:
                raise ValueError(
                    f"{self.path.name}: tensor {name!r} is of ggml's type {number}, which is not known here."
                )
            kind, size, width = TYPES[number]
            self.tensors[name] = StoredTensor(kind, shape, start + offset, math.prod(shape) // size * width)

    def read(self, name: str) -> torch.Tensor:
        """The bytes of a tensor: uint8 (rows, bytes of a row)."""
        tensor = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            raw = bytearray(file.read(tensor.bytes))
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        return torch.frombuffer(raw, dtype=torch.uint8).view(rows, -1)


def _take(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))


def _string(file: BinaryIO) -> str:
    (length,) = _take(file, "Q")
    return _take(file, f"{length}s")[0].decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        if kind not in _SCALARS:
            raise ValueError(f"unknown kind of value in the metadata: {kind}")
        return _take(file, _SCALARS[kind])[0]
    inner, length = _take(file, "IQ")
    if inner in _SCALARS:
        return list(_take(file, f"{length}{_SCALARS[inner]}"))
    return [_value(file, inner) for _ in range(length)]
