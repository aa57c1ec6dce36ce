"""A `Source` over a checkpoint on disk, read tensor by tensor; the model is never built.

What the formats share is here; `layouts.py` has the formats.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GenerationConfig

from ..formats.record import KEY, Record
from ..formats.source import LayerInfo, Source
from ..grid import Grid, GridTensor


class FolderSource(Source):
    """A folder with config.json and model*.safetensors in one of the formats.

    Raises:
        ValueError: the checkpoint is float, in another format, or uses a part of it that has no exact counterpart.

    Attributes:
        format: as in `formats.FORMATS`.
        bits: width of the stored codes.
        file_group: inputs that share a stored scale; -1: all. (The grid's may be larger, with the scale repeated.)
        parts: last parts of the names of tensors that belong to a quantized layer's weight.
    """

    format: ClassVar[str]
    parts: tuple[str, ...]
    bits: int
    _grid: Grid

    def __init__(self, folder: Path, described: dict[str, Any]) -> None:
        """
        Args:
            described: the content of config.json.
        """
        self.folder, self.origin = folder, folder.resolve().name
        self.files, self.metadata = _tensor_files(folder)
        record = Record.read(described.get(KEY))
        if record is not None:
            self.recipe, self.scale_dtype = record.recipe, record.scale_dtype
        self._read_config(described["quantization_config"])
        self.file_group = self._grid.group_size or -1
        self._grid = self._grid if record is None else record.grid
        self.config = AutoConfig.from_pretrained(folder)
        for known in ("quantization_config", KEY):
            if hasattr(self.config, known):
                delattr(self.config, known)
        if (folder / "generation_config.json").exists():
            self.generation_config = GenerationConfig.from_pretrained(folder)
        if (folder / "tokenizer_config.json").exists():
            self.tokenizer = str(folder)
        self.tied = {}
        if not self._infos:
            raise ValueError(f"The checkpoint in {str(folder)!r} has no quantized layer.")

    # -- what a format says

    @abstractmethod
    def _read_config(self, described: dict[str, Any]) -> None:
        """Set `bits`, `_grid` (of the container), `activations` and `float_linears`; refuse what is not
        known."""

    @abstractmethod
    def _shape(self, module: str) -> tuple[int, int] | None:
        """(out, in) of a module's weight, None if it is not quantized."""

    @abstractmethod
    def _codes(self, module: str) -> torch.Tensor:
        """int8 (out, in)."""

    @abstractmethod
    def _scales(self, module: str) -> torch.Tensor:
        """(out or 1, groups of the file), any float dtype."""

    def _zero_points(self, module: str) -> torch.Tensor:
        """int8, as `_scales`; asked for asymmetric grids only."""
        raise NotImplementedError

    def _dtype(self, module: str) -> torch.dtype:
        """Of the model, for this layer."""
        return self.config.dtype or torch.float32

    # -- a source

    def _refuse(self, problem: str) -> ValueError:
        return ValueError(f"{self.folder.name}: {problem}")

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name].path, framework="pt") as file:
            return file.get_tensor(name)

    @cached_property
    def _infos(self) -> dict[str, LayerInfo]:
        found = {}
        for module in dict.fromkeys(name.rpartition(".")[0] for name in self.files):
            shape = self._shape(module)
            if shape is not None:
                bias, dtype = module + ".bias" in self.files, self._dtype(module)
                found[module] = LayerInfo(*shape, self._grid, "linear", bias, dtype, self.bits)
        return found

    def grids(self) -> dict[str, LayerInfo]:
        return dict(self._infos)

    def _coarse(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """What the file repeats (a scale per channel in every group, or per tensor in every row), once."""
        info = self._infos[name]
        rows, groups = info.grid.scale_shape(info.out_features, info.in_features)
        stored = stored.expand(info.out_features, -1)
        once = stored[:rows, :: max(1, stored.shape[1] // groups)]
        if not torch.equal(once.repeat_interleave(stored.shape[1] // groups, 1).expand(stored.shape), stored):
            raise self._refuse(f"{name}: scales differ within what config.json records as {info.grid.describe()}.")
        return once.contiguous()

    def scale(self, name: str) -> torch.Tensor:
        return self._coarse(name, self._scales(name).float())

    def layer(self, name: str) -> GridTensor:
        grid, codes = self._infos[name].grid, self._codes(name)
        if codes.min() < grid.qmin or codes.max() > grid.qmax:
            raise self._refuse(
                f"{name} holds codes from {int(codes.min())} to {int(codes.max())}, outside of the grid that "
                f"config.json records ({grid.describe()}): the checkpoint is damaged or was edited."
            )
        zero = None if grid.symmetric else self._coarse(name, self._zero_points(name))
        return GridTensor(codes, self.scale(name), zero, grid)

    def floats(self, packed: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.files:
            module, _, part = name.rpartition(".")
            if module not in self._infos or part not in self.parts:
                yield name, self._read(name)
            elif part == self.parts[0] and module not in packed:
                yield module + ".weight", self.layer(module).dequantize(self._infos[module].dtype)


class Entry(NamedTuple):
    """A tensor of a file, as the header describes it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # "F16", "BF16", "I32" ...


def _tensor_files(folder: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensor name -> entry, and the files' metadata."""
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise ValueError(f"The folder {str(folder)!r} holds no model*.safetensors.")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(wanted - {path.name for path in paths})
        if missing:
            raise ValueError(f"{index.name} of {str(folder)!r} names {', '.join(missing)}, which do not exist.")
        paths = [path for path in paths if path.name in wanted]
    found: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                metadata.update(file.metadata() or {})
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    found[name] = Entry(path, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is truncated or damaged ({error}). Copy or download it again.") from error
    return found, metadata


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
