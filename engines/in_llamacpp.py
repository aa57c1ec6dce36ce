"""llama.cpp, the library inside the xllamacpp wheel. It rounds activations to 8 bits in blocks of 32 by itself."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import job
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tests.ggml import Llama


class LlamaCpp:
    def __init__(self, path: Path, ends: set[int]) -> None:
        self.llama, self.ends = Llama(path, context=512), ends
        library = self.llama.lib
        library.llama_get_memory.restype, library.llama_get_memory.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        library.llama_memory_clear.restype = None
        library.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]

    def _forget(self) -> None:
        self.llama.lib.llama_memory_clear(self.llama.lib.llama_get_memory(self.llama.context), True)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        self._forget()
        out: list[int] = []
        new, start = ids, 0
        while len(out) < count and not (out and out[-1] in self.ends):
            out.append(int(self.llama.logits(new, start)[-1].argmax()))
            new, start = out[-1:], start + len(new)
        return out

    def logits(self, ids: list[int]) -> torch.Tensor:
        self._forget()
        return self.llama.logits(ids)


def open_engine(wanted: dict[str, Any]) -> job.Engine:
    return LlamaCpp(next(Path(wanted["folder"]).glob("*.gguf")), set(wanted["ends"]))


if __name__ == "__main__":
    job.answer(open_engine, ["xllamacpp"])
