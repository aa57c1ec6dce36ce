"""What a GGUF file holds, read from its header.

The package `gguf` has a reader too, which refuses a whole file for one tensor of a type that it does not know, as
version 0.19 does with Q2_0.

Every count and length of the header is compared with the bytes that are left of the file before anything is done as
often, or made as large, so a file takes time and memory in proportion to its size, whoever wrote it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...files import regular_file
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
_DEEPEST = 4  # arrays of arrays
_LONGEST_HEADER = 1 << 27  # bytes; a vocabulary of 256k tokens with its merges takes some 20 MB


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file.

    Attributes:
        type: name of the type, such as "q4_0" or "f32".
        shape: as PyTorch counts, (experts, out, in), (out, in) or (n,).
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
        ValueError: it is no GGUF file of version 2 or 3, is truncated or damaged, or has tensors of other types than
            `TYPES`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        try:
            with regular_file(path).open("rb") as file:
                self._read(_Header(file, path.stat().st_size))
        except _Damaged as error:
            raise ValueError(f"{str(path)!r} {error}. Copy or download it again.") from error

    def _read(self, header: _Header) -> None:
        if header.raw(4) != b"GGUF":
            raise _Damaged("is no GGUF file")
        version, count, pairs = header.take("IQQ")
        if version not in (2, 3):
            raise ValueError(f"{str(self.path)!r} is GGUF version {version}; 2 and 3 can be read.")
        header.need(pairs, 13)  # an empty key, a kind and a byte
        for _ in range(pairs):
            key = header.string()
            if key in self.metadata:
                raise _Damaged(f"has the key {key!r} twice")
            self.metadata[key] = header.value(*header.take("I"))
        header.need(count, 32)
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name, (dimensions,) = header.string(), header.take("I")
            if name in infos or not 1 <= dimensions <= 4:
                raise _Damaged(f"has the tensor {name!r} twice, or with {dimensions} dimensions")
            infos[name] = (header.take("Q" * dimensions)[::-1], *header.take("IQ"))
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise _Damaged(f"says that `general.alignment` is {alignment!r}")
        start = -(-header.at // alignment) * alignment
        for name, (shape, number, offset) in infos.items():
            if number not in TYPES:
                raise ValueError(
                    f"{str(self.path)!r}: tensor {name!r} is of ggml's type {number}, which is not known here."
                )
            kind, size, width = TYPES[number]
            if shape[-1] % size or not all(shape):
                raise _Damaged(f"has a tensor {name!r} of shape {shape}, which {kind} cannot have")
            self.tensors[name] = StoredTensor(kind, shape, start + offset, math.prod(shape) // size * width)
        at = start
        for name, tensor in sorted(self.tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < at:
                raise _Damaged(f"has a tensor {name!r} that shares bytes with another")
            at = tensor.offset + tensor.bytes
        if at > header.size and self.tensors:
            raise _Damaged(f"is truncated: it should have {at} bytes")

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """The bytes of a tensor: uint8 (rows, bytes of a row).

        Args:
            expert: one of the matrices of a tensor that has three dimensions; None: all rows.
        """
        tensor = self.tensors[name]
        rows = math.prod(tensor.shape[:-1])
        start, count = tensor.offset, tensor.bytes
        if expert is not None:
            rows, count = rows // tensor.shape[0], count // tensor.shape[0]
            start += expert * count
        with self.path.open("rb") as file:
            file.seek(start)
            raw = bytearray(file.read(count))
        if len(raw) != count:
            raise ValueError(f"{str(self.path)!r} was cut while it was read.")
        return torch.frombuffer(raw, dtype=torch.uint8).view(rows, -1)

    def matrices(self, name: str) -> Iterator[torch.Tensor]:
        """The bytes of a tensor, matrix by matrix."""
        for expert in range(self.tensors[name].shape[0]) if len(self.tensors[name].shape) > 2 else (None,):
            yield self.read(name, expert)


class _Damaged(Exception):
    """What is wrong with the file, to be said after its name."""


class _Header:
    """The beginning of a file, read on from `at`."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size, self.at = file, size, 0

    def need(self, count: int, each: int = 1) -> None:
        """Raise if fewer bytes are left than `count` things of at least `each` bytes take."""
        if count * each > min(self.size, _LONGEST_HEADER) - self.at:
            raise _Damaged(f"is truncated or damaged: {count} entries of its header do not fit in {self.size} bytes")

    def raw(self, count: int) -> bytes:
        self.need(count)
        self.at += count
        return self._file.read(count)

    def take(self, form: str) -> tuple[Any, ...]:
        """Numbers, in the letters of `struct`."""
        return struct.unpack("<" + form, self.raw(struct.calcsize("<" + form)))

    def string(self) -> str:
        (length,) = self.take("Q")
        try:
            return self.raw(length).decode()
        except UnicodeDecodeError as error:
            raise _Damaged(f"is damaged ({error})") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of the metadata."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])[0]
        if kind != _ARRAY or depth == _DEEPEST:
            raise _Damaged(f"is damaged: its metadata hold a value of kind {kind}, in {depth} arrays")
        inner, length = self.take("IQ")
        self.need(length, struct.calcsize(_SCALARS.get(inner, "Q")))
        if inner in _SCALARS:
            return list(self.take(f"{length}{_SCALARS[inner]}"))
        return [self.value(inner, depth + 1) for _ in range(length)]
