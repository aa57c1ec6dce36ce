"""How each format in safetensors files holds a layer: what `FolderSource` needs to read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..formats import bitnet, gptq
from ..grid import PER_CHANNEL, PER_TENSOR, TERNARY, Grid
from ..packing import unpack, words_per_row
from .folder import DTYPES, FolderSource

_TOKEN_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


class CompressedTensorsFolder(FolderSource):
    """compressed-tensors, "pack-quantized" or "int-quantized"."""

    format = "compressed-tensors"
    parts: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")

    def _read_config(self, described: dict[str, Any]) -> None:
        groups = list(described.get("config_groups", {}).values())
        schemes = [(group.get("weights"), group.get("input_activations")) for group in groups]
        if not schemes or any(scheme != schemes[0] for scheme in schemes[1:]):
            raise self._refuse(f"config.json has {len(schemes)} different groups of layers; one grid can be read.")
        weights, activations = schemes[0]
        if not weights or weights.get("type") != "int" or weights.get("strategy") not in ("group", "channel", "tensor"):
            raise self._refuse(f"weights are quantized as {weights}; integers per group, channel or tensor are needed.")
        if weights.get("actorder") in ("group", "dynamic") or described.get("kv_cache_scheme"):
            raise self._refuse("activation-ordered groups and quantized caches have no counterpart here.")
        if activations is not None:
            if any(activations.get(key) != value for key, value in _TOKEN_INT8.items()):
                raise self._refuse(f"activations are quantized as {activations}; {_TOKEN_INT8} can be read.")
            self.activations = "compressed-tensors"
            self.parts = ("weight", "weight_scale")  # "int-quantized": codes are not packed
        self.bits = weights["num_bits"]
        group_size = {"group": weights.get("group_size"), "channel": PER_CHANNEL, "tensor": PER_TENSOR}
        self._grid = Grid(self.bits, group_size[weights["strategy"]], weights.get("symmetric", True))
        self.float_linears = list(described.get("ignore") or [])

    def _dtype(self, module: str) -> torch.dtype:
        return DTYPES[self.files[module + ".weight_scale"].dtype]

    def _shape(self, module: str) -> tuple[int, int] | None:
        codes = self.files.get(f"{module}.{self.parts[0]}")
        if codes is None or module + ".weight_scale" not in self.files:
            return None
        if self.parts[0] == "weight":
            return codes.shape[0], codes.shape[1]
        rows, cols = self._read(module + ".weight_shape").tolist()
        if codes.shape[1] != words_per_row(cols, self.bits):
            raise self._refuse(
                f"{module}: {cols} codes of {self.bits} bits take {words_per_row(cols, self.bits)} words, not "
                f"{codes.shape[1]}. compressed-tensors before 0.18 packed 3, 5, 6 and 7 bits in another way; write the "
                "checkpoint again."
            )
        return rows, cols

    def _codes(self, module: str) -> torch.Tensor:
        stored = self._read(f"{module}.{self.parts[0]}")
        return stored if self.parts[0] == "weight" else unpack(stored, self.bits, self._infos[module].in_features)

    def _scales(self, module: str) -> torch.Tensor:
        return self._read(module + ".weight_scale").reshape(-1, self.files[module + ".weight_scale"].shape[-1])

    def _zero_points(self, module: str) -> torch.Tensor:
        packed = self._read(module + ".weight_zero_point").t().contiguous()
        return unpack(packed, self.bits, self._infos[module].out_features).t()


class BitNetFolder(FolderSource):
    """transformers' BitNet format with the scale itself (`autobitlinear`, offline)."""

    format = "bitnet"
    parts = ("weight", "weight_scale")

    def _read_config(self, described: dict[str, Any]) -> None:
        if (described.get("linear_class"), described.get("quantization_mode")) != ("autobitlinear", "offline"):
            raise self._refuse(
                "of BitNet's layers, `linear_class='autobitlinear'` with `quantization_mode='offline'` holds the scale "
                "itself; 'bitlinear' holds its rounded inverse."
            )
        self.bits, self._grid = 2, Grid(TERNARY, PER_TENSOR)
        self.activations = "bitnet"
        self.float_linears = list(described.get("modules_to_not_convert") or [])

    def _shape(self, module: str) -> tuple[int, int] | None:
        codes = self.files.get(module + ".weight")
        if codes is None or codes.dtype != "U8":
            return None
        return 4 * codes.shape[0], codes.shape[1]

    def _dtype(self, module: str) -> torch.dtype:
        return DTYPES[self.files[module + ".weight_scale"].dtype]

    def _codes(self, module: str) -> torch.Tensor:
        return bitnet.unpack(self._read(module + ".weight"))

    def _scales(self, module: str) -> torch.Tensor:
        return self._read(module + ".weight_scale").view(1, 1)


class GPTQFolder(FolderSource):
    """GPTQ without reordered groups, version 1 or 2."""

    format = "gptq"
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def _read_config(self, described: dict[str, Any]) -> None:
        self.bits, self._version = described["bits"], described.get("checkpoint_format") or described.get("format")
        self._version = self._version or "gptq"
        if described.get("desc_act"):
            raise self._refuse("`desc_act` reorders the groups, which has no counterpart here.")
        if self.bits not in gptq.BITS or self._version not in gptq.VERSIONS:
            raise self._refuse(f"{self.bits} bits in checkpoint_format={self._version!r} cannot be read.")
        group_size = described["group_size"]
        self._grid = Grid(self.bits, group_size if group_size > 0 else PER_CHANNEL, bool(described.get("sym", True)))
        packed = {name.rpartition(".")[0] for name in self.files if name.endswith(".qweight")}
        self.float_linears = [
            name.removesuffix(".weight")
            for name, entry in self.files.items()
            if name.endswith(".weight") and len(entry.shape) == 2 and name.removesuffix(".weight") not in packed
        ]

    def _shape(self, module: str) -> tuple[int, int] | None:
        packed = self.files.get(module + ".qweight")
        return None if packed is None else (packed.shape[1], packed.shape[0] * 32 // self.bits)

    def _codes(self, module: str) -> torch.Tensor:
        info = self._infos[module]
        return unpack(self._read(module + ".qweight").t().contiguous(), self.bits, info.in_features)

    def _scales(self, module: str) -> torch.Tensor:
        return self._read(module + ".scales").t()

    def _zero_points(self, module: str) -> torch.Tensor:
        zero = unpack(self._read(module + ".qzeros"), self.bits, self._infos[module].out_features).t()
        if self._version == "gptq_v2":
            return zero
        if int(zero.max()) == (1 << (self.bits - 1)) - 1:
            raise self._refuse(
                f"{module}: a zero point wrapped around in version 1 of GPTQ; engines read it differently."
            )
        return zero + 1


class TorchAOFolder(FolderSource):
    """torchao's `IntxUnpackedToInt8Tensor`, found by the files' metadata; torchao itself is not needed."""

    format = "torchao"
    parts = ("_weight_qdata", "_weight_scale", "_weight_zero_point")

    def _read_config(self, described: dict[str, Any]) -> None:
        entries = [json.loads(text) for name, text in self.metadata.items() if name.endswith(".weight")]
        kinds = {entry["_type"] for entry in entries} - {torch.Tensor.__name__}
        if kinds != {"IntxUnpackedToInt8Tensor"}:
            raise self._refuse(
                f"tensors are {', '.join(sorted(kinds)) or 'floats'}; IntxUnpackedToInt8Tensor can be read."
            )
        data = [entry["_data"] for entry in entries if entry["_type"] != torch.Tensor.__name__]
        widths = {item["target_dtype"]["_data"] for item in data}
        if len(widths) > 1 or any(item["activation_quantization"] is not None for item in data):
            raise self._refuse("one width of codes and float activations can be read.")
        self.bits = int(widths.pop().removeprefix("int"))
        zeros = [name for name in self.files if name.endswith("._weight_zero_point")]
        symmetric = not any(bool(self._read(name).any()) for name in zeros)
        scales = {name.rpartition(".")[0]: e.shape for name, e in self.files.items() if name.endswith("._weight_scale")}
        groups = {self.files[m + "._weight_qdata"].shape[1] // shape[1] for m, shape in scales.items()}
        per_channel = all(shape[1] == 1 for shape in scales.values())
        if not per_channel and len(groups) > 1:
            raise self._refuse(f"groups of {sorted(groups)} in one checkpoint; one grid can be read.")
        self._grid = Grid(self.bits, PER_CHANNEL if per_channel else groups.pop(), symmetric)
        self.float_linears = list(described.get("modules_to_not_convert") or [])

    def _shape(self, module: str) -> tuple[int, int] | None:
        codes = self.files.get(module + "._weight_qdata")
        return None if codes is None else (codes.shape[0], codes.shape[1])

    def _dtype(self, module: str) -> torch.dtype:
        return DTYPES[self.files[module + "._weight_scale"].dtype]

    def _codes(self, module: str) -> torch.Tensor:
        return self._read(module + "._weight_qdata")

    def _scales(self, module: str) -> torch.Tensor:
        return self._read(module + "._weight_scale")

    def _zero_points(self, module: str) -> torch.Tensor:
        return self._read(module + "._weight_zero_point")


_LAYOUTS: dict[str, type[FolderSource]] = {
    kind.format: kind for kind in (CompressedTensorsFolder, BitNetFolder, GPTQFolder, TorchAOFolder)
}


def open_checkpoint(folder: Path) -> FolderSource:
    """The source of a folder with a checkpoint.

    Raises:
        ValueError: it is float, or in a format that cannot be read.
    """
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = described.get("quantization_config")
    method = (quantization or {}).get("quant_method")
    if method not in _LAYOUTS:
        what = "float" if quantization is None else f"of format {method!r}"
        raise ValueError(
            f"The checkpoint in {str(folder)!r} is {what}. What can be read: {', '.join(_LAYOUTS)}, and "
            "adapters of LR-QAT and low-bit SR."
        )
    return _LAYOUTS[method](folder, described)
