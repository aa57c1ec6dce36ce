"""ggml and llama.cpp themselves, as judges: the C library inside the `xllamacpp` wheel, called directly."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.metadata import files
from types import TracebackType
from typing import Any

import numpy as np
import pytest
import torch

from peft_lrqat.grid import Grid, GridTensor
from tests.grids import either_sign

pytest.importorskip("xllamacpp", reason="ggml comes with xllamacpp")

_VOID, _INT = ctypes.c_void_p, ctypes.c_int32


@ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _VOID)
def _silence(level: int, text: bytes, data: int) -> None:
    """A log callback that drops everything."""


class _Parameters(ctypes.Structure):
    """llama_model_params or llama_context_params, passed by value in memory: longer than either of them."""

    _fields_ = [("words", ctypes.c_uint64 * 128)]


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", _INT),
        *((name, _VOID) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    ]


@cache
def library() -> Any:
    path = next(file.locate() for file in files("xllamacpp") or [] if file.name.endswith(".so"))
    lib: Any = ctypes.CDLL(str(path))
    for name, result, *arguments in (
        ("llama_backend_init", None),
        ("llama_model_default_params", _Parameters),
        ("llama_context_default_params", _Parameters),
        ("llama_model_load_from_file", _VOID, ctypes.c_char_p, _Parameters),
        ("llama_init_from_model", _VOID, _VOID, _Parameters),
        ("llama_model_get_vocab", _VOID, _VOID),
        ("llama_vocab_n_tokens", _INT, _VOID),
        ("llama_tokenize", _INT, _VOID, ctypes.c_char_p, _INT, _VOID, _INT, ctypes.c_bool, ctypes.c_bool),
        ("llama_token_to_piece", _INT, _VOID, _INT, ctypes.c_char_p, _INT, _INT, ctypes.c_bool),
        ("llama_decode", _INT, _VOID, _Batch),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), _VOID, _INT),
        ("llama_free", None, _VOID),
        ("llama_model_free", None, _VOID),
        ("llama_log_set", None, _VOID, _VOID),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_backend_init()
    lib.llama_log_set(_silence, None)
    return lib


def dequantize(stored: torch.Tensor, kind: str, columns: int) -> torch.Tensor:
    """ggml's own `dequantize_row_*`: uint8 (rows, bytes) to fp32 (rows, columns)."""
    function = getattr(library(), "dequantize_row_" + kind.replace("_k", "_K"))
    function.restype, function.argtypes = None, [_VOID, _VOID, ctypes.c_int64]
    out = torch.empty(stored.shape[0], columns)
    for row, result in zip(stored.contiguous(), out, strict=True):
        function(row.data_ptr(), result.data_ptr(), columns)
    return out


class Llama:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Any, context: int = 256) -> None:
        lib = self.lib = library()
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        assert self.model, f"llama.cpp cannot load {path}"
        parameters = lib.llama_context_default_params()
        words = ctypes.cast(ctypes.pointer(parameters), ctypes.POINTER(ctypes.c_uint32))
        words[0] = words[1] = words[2] = context  # n_ctx, n_batch, n_ubatch
        words[7] = words[8] = 1  # threads: ggml's wait for each other busily, badly where other processes run
        words[13] = 0  # flash_attn_type
        # type_k and type_v, F16 by default, follow two null pointers: a cache in F32 rounds nothing
        cache = next(i for i in range(16, 64) if list(words[i : i + 6]) == [0, 0, 0, 0, 1, 1]) + 4
        words[cache] = words[cache + 1] = 0
        self.context = lib.llama_init_from_model(self.model, parameters)
        assert self.context, f"llama.cpp cannot run {path}"
        self.vocab = lib.llama_model_get_vocab(self.model)

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special`: add what the model's tokenizer adds, and read special tokens in the text."""
        raw = text.encode()
        ids = (ctypes.c_int32 * (4 * len(raw) + 8))()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), special, special)
        assert count >= 0
        return list(ids[:count])

    def pieces(self, ids: list[int]) -> str:
        """The text of token ids, special ones left out."""
        out = b""
        for token in ids:
            buffer = ctypes.create_string_buffer(256)
            length = self.lib.llama_token_to_piece(self.vocab, token, buffer, 256, 0, False)
            out += buffer.raw[:length]
        return out.decode(errors="replace")

    def logits(self, ids: list[int], start: int = 0) -> torch.Tensor:
        """fp32 (len(ids), vocabulary); `ids` follow what was given before if `start` is not 0."""
        count, words = len(ids), self.lib.llama_vocab_n_tokens(self.vocab)
        batch = _Batch(count)
        tokens, positions = (ctypes.c_int32 * count)(*ids), (ctypes.c_int32 * count)(*range(start, start + count))
        lengths, flags = (ctypes.c_int32 * count)(*[1] * count), (ctypes.c_int8 * count)(*[1] * count)
        zero = (ctypes.c_int32 * 1)(0)
        sequences = (_VOID * count)(*[ctypes.addressof(zero)] * count)
        arrays = {"token": tokens, "pos": positions, "n_seq_id": lengths, "seq_id": sequences, "logits": flags}
        for name, array in arrays.items():
            setattr(batch, name, ctypes.addressof(array))
        assert self.lib.llama_decode(self.context, batch) == 0
        rows = [np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (words,)) for i in range(count)]
        return torch.from_numpy(np.stack(rows))


def filled(grid: Grid, rows: int = 4, columns: int = 512) -> GridTensor:
    """Random codes with both ends of the grid in every row, random scales of both signs, or zero points."""
    codes = torch.randint(grid.qmin, grid.qmax + 1, (rows, columns)).to(torch.int8)
    codes[:, 0], codes[:, -1] = grid.qmin, grid.qmax
    shape = grid.scale_shape(rows, columns)
    scale = either_sign((torch.rand(shape) * 0.1 + 0.01).bfloat16().float(), grid)
    zero_point = None if grid.symmetric else torch.randint(grid.qmin, grid.qmax + 1, shape).to(torch.int8)
    return GridTensor(codes, scale, zero_point, grid)
