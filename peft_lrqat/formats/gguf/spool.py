"""A GGUF file that is written tensor by tensor.

The header stands first and lists every tensor's type, but which type holds a layer exactly is known only when the layer
has been seen. So tensors go to a second file, one after the other, and are appended to the header in the end.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from .reader import TYPES

_NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}


class Spool:
    """Collects tensors for a `gguf.GGUFWriter`; a context manager, which deletes what it collected."""

    def __init__(self, writer: Any, folder: Path) -> None:
        self.writer = writer
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - this is a context manager itself

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, name: str, type_name: str, shape: tuple[int, ...], data: Iterable[torch.Tensor]) -> None:
        """Add a tensor.

        Args:
            type_name: one of ggml's types, such as "q4_0".
            shape: of the weights, as PyTorch counts.
            data: uint8, the tensor's bytes, in one part or in several.
        """
        _, size, width = TYPES[_NUMBERS[type_name]]
        length = math.prod(shape) // size * width
        # int8, not uint8: for that the writer would look the type up, and it does not know Q2_0
        self.writer.add_tensor_info(name, shape, np.dtype(np.int8), length, raw_dtype=_NUMBERS[type_name])
        written = 0
        for part in data:
            part.contiguous().numpy().tofile(self._file)
            written += part.numel()
        assert written == length, f"{name}: {written} bytes for {shape} as {type_name}"
        self.writer.write_padding(self._file, length)

    def write(self, path: Path) -> None:
        """Write the file: header, metadata, tensors."""
        writer = self.writer
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        out = writer.fout[0]
        writer.write_padding(out, out.tell())
        self._file.seek(0)
        shutil.copyfileobj(self._file, out, 1 << 24)
        writer.close()
