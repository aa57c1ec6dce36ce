"""safetensors files: their headers, and writing them as the tensors come, so that no checkpoint stands in memory whole.

A safetensors file is

    8 bytes: length of the header | header (JSON: name -> dtype, shape, byte range) | the tensors' bytes, without gaps

The header comes first but is known last, so a shard's bytes are collected in temporary files beside it. There is one
for each element size, written out from the largest to the smallest: every tensor is aligned to its element then, as
safetensors' own writer does it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..files import json_object, regular_file

#: safetensors' names of dtypes.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor of a file, as its header describes it."""

    shape: tuple[int, ...]
    dtype: str  # a name of `DTYPES`, or of a dtype that is not read here

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * (DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1)


def read_header(path: str | os.PathLike) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensor name -> entry, and the metadata of a safetensors file; its data is not read.

    The library `safetensors` checks the header: it is no longer than 100 MB, its byte ranges do not overlap, and they
    are all of the file, so what is read later takes no more memory than that. A name that comes twice is found here.

    Raises:
        ValueError: the file is truncated, no safetensors file, or no file at all.
    """
    path = regular_file(Path(path))
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is truncated or damaged ({error}). Copy or download it again.") from error
    with path.open("rb") as file:
        header = json_object(file.read(int.from_bytes(file.read(8), "little")), path)
    metadata = header.pop("__metadata__", None) or {}
    return {name: Entry(tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}, metadata


def read_headers(
    paths: Iterable[str | os.PathLike], weight_map: Mapping[str, str] | None
) -> tuple[dict[str, Entry], dict[str, Path], dict[str, str]]:
    """Tensor name -> entry, and -> the file that holds it, and the metadata, of the files of one checkpoint.

    Args:
        weight_map: tensor name -> file name, as the index says; None: there is one file, and no index.

    Raises:
        ValueError: a file is damaged, or the files do not hold exactly what the index says. Programs differ in which of
            two tensors of one name they take, and in whether they take one that the index does not name.
    """
    found: dict[str, Entry] = {}
    places: dict[str, Path] = {}
    metadata: dict[str, str] = {}
    for path in map(Path, paths):
        entries, strings = read_header(path)
        metadata.update(strings)
        for name, entry in entries.items():
            if name in found or (weight_map is not None and weight_map.get(name) != path.name):
                said = "twice in the files" if name in found else f"in {path.name}, where the index does not place it"
                raise ValueError(
                    f"The tensor {name!r} is {said} of {str(path.parent)!r}. Download or write the checkpoint again."
                )
            found[name], places[name] = entry, path
    if weight_map is not None and (lost := sorted(weight_map.keys() - found.keys())):
        raise ValueError(
            f"The index of {str(next(iter(places.values())).parent) if places else 'the checkpoint'!r} names tensors "
            f"that its files do not hold: {', '.join(lost[:3])}. The checkpoint is incomplete: download or write it "
            "again."
        )
    return found, places, metadata


class ShardWriter:
    """Writes `model.safetensors`, or numbered shards and their index, into a folder.

    Attributes:
        total_bytes: of the tensors written.
        metadata: strings for the files' headers; may be added to until `close`.
    """

    def __init__(self, folder: Path, max_shard_size: int) -> None:
        """
        Args:
            max_shard_size: bytes; a shard is closed before it would grow beyond (one larger tensor is a shard of its
                own).
        """
        self.folder, self.max_shard_size = folder, max_shard_size
        self.total_bytes = 0
        self.metadata = {"format": "pt"}
        self._shards: list[dict[str, dict]] = []  # per shard: name -> dtype, shape, element size, position in its part
        self._seen: set[str] = set()
        self._sizes: dict[int, int] = {}  # element size -> bytes in the current shard

    @property
    def names(self) -> list[str]:
        """The names of all tensors that were added."""
        return [name for shard in self._shards for name in shard]

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor (from any device).

        Raises:
            ValueError: a name comes twice, or the dtype has no place in safetensors.
        """
        if name in self._seen:
            raise ValueError(f"Two tensors of the checkpoint would be called {name!r}.")
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name!r} is {tensor.dtype}, which safetensors files cannot hold.")
        self._seen.add(name)
        tensor = tensor.detach().cpu().contiguous()
        if not self._shards or sum(self._sizes.values()) + tensor.nbytes > self.max_shard_size:
            self._shards.append({})
            self._sizes = {}
        size = tensor.element_size()
        start = self._sizes.get(size, 0)
        self._shards[-1][name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "size": size, "start": start}
        self._sizes[size] = start + tensor.nbytes
        self.total_bytes += tensor.nbytes
        with open(self._part(len(self._shards) - 1, size), "ab") as file:
            tensor.reshape(-1).view(torch.uint8).numpy().tofile(file)

    def _part(self, shard: int, size: int) -> Path:
        return self.folder / f".shard-{shard}.{size}"

    def close(self) -> None:
        """Write the shards, and the index if there are several."""
        count = len(self._shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        names = names if count > 1 else ["model.safetensors"]
        for i, (file, entries) in enumerate(zip(names, self._shards, strict=True)):
            self._assemble(i, self.folder / file, entries)
        if count > 1:
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": {name: file for file, shard in zip(names, self._shards, strict=True) for name in shard},
            }
            path = self.folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _assemble(self, shard: int, path: Path, entries: dict[str, dict]) -> None:
        parts = [(size, self._part(shard, size)) for size in (8, 4, 2, 1) if self._part(shard, size).exists()]
        starts, offset = {}, 0
        for size, part in parts:
            starts[size] = offset
            offset += part.stat().st_size
        header: dict = {"__metadata__": self.metadata}
        for name, entry in entries.items():
            begin = starts[entry["size"]] + entry["start"]
            nbytes = entry["size"] * math.prod(entry["shape"])
            header[name] = {
                "dtype": _NAMES[entry["dtype"]], "shape": entry["shape"], "data_offsets": [begin, begin + nbytes]
            }  # fmt: skip
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, part in parts:
                with open(part, "rb") as data:
                    shutil.copyfileobj(data, file, 1 << 22)
                part.unlink()


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "200MB", "8KB" (powers of 1000) or of a number.

    Raises:
        ValueError: it is neither, or not positive.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    text = str(size).strip().upper()
    number, unit = (text[:-2], units[text[-2:]]) if text[-2:] in units else (text, 1)
    try:
        parsed = int(float(number) * unit)
    except ValueError:
        parsed = 0
    if parsed <= 0 or isinstance(size, bool):
        raise ValueError(f"`max_shard_size` is {size!r}; allowed: a number of bytes, or one such as '200MB'.")
    return parsed
