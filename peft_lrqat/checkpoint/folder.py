"""A `Source` over a merged checkpoint on disk, read tensor by tensor; the model is never built."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GenerationConfig

from ..grid import PER_CHANNEL, PER_TENSOR, TERNARY, Grid
from ..packing import unpack
from . import bitnet, trained
from .activations import ACTIVATION_LEVELS
from .source import GridTensor, LayerInfo, Source

_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


class FolderSource(Source):
    """A folder in the compressed-tensors format ("pack-quantized", "int-quantized") or transformers' BitNet format.

    Raises:
        ValueError: the checkpoint is float, in another format, or uses a part of it that has no exact counterpart.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.origin = folder, folder.name
        self._files = _tensor_files(folder)
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantization = described.get("quantization_config")
        method = (quantization or {}).get("quant_method")
        if method not in ("compressed-tensors", "bitnet"):
            what = "float" if quantization is None else f"of format {method!r}"
            raise ValueError(
                f"The checkpoint in {str(folder)!r} is {what}. What can be read: merged checkpoints in the formats "
                "compressed-tensors and bitnet, and adapters of LR-QAT and low-bit SR."
            )
        entry = described.get(trained.KEY) or {}
        self.recipe, self.scale_dtype = entry.get("recipe"), entry.get("scale_dtype")
        self._recorded = trained.recorded_grid(entry)
        self._bitnet = method == "bitnet"
        if self._bitnet:
            self._read_bitnet(quantization)
        else:
            self._read_compressed_tensors(quantization)
        self.config = AutoConfig.from_pretrained(folder)
        for known in ("quantization_config", trained.KEY):
            if hasattr(self.config, known):
                delattr(self.config, known)
        if (folder / "generation_config.json").exists():
            self.generation_config = GenerationConfig.from_pretrained(folder)
        if (folder / "tokenizer_config.json").exists():
            self.tokenizer = str(folder)
        self.tied = {}
        if not self._infos:
            raise ValueError(f"The checkpoint in {str(folder)!r} has no quantized layer.")

    # -- config.json

    def _read_compressed_tensors(self, described: dict[str, Any]) -> None:
        groups = list(described.get("config_groups", {}).values())
        schemes = [(g.get("weights"), g.get("input_activations")) for g in groups]
        if not schemes or any(scheme != schemes[0] for scheme in schemes[1:]):
            raise ValueError(
                f"{self.folder.name}: config.json has {len(schemes)} different groups of layers (`config_groups`); a "
                "checkpoint with one grid can be read."
            )
        weights, activations = schemes[0]
        if not weights or weights.get("type") != "int" or weights.get("strategy") not in ("group", "channel", "tensor"):
            raise ValueError(
                f"{self.folder.name}: weights are quantized as {weights}; integers per group, channel or tensor are "
                "needed."
            )
        if weights.get("actorder") in ("group", "dynamic") or described.get("kv_cache_scheme"):
            raise ValueError(
                f"{self.folder.name}: activation-ordered groups (`actorder`) and quantized caches (`kv_cache_scheme`) "
                "have no counterpart here."
            )
        if activations is not None:
            wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
            if any(activations.get(key) != value for key, value in wanted.items()):
                raise ValueError(f"{self.folder.name}: activations are quantized as {activations}; not as {wanted}.")
            self.act_bits, self.act_levels = 8, ACTIVATION_LEVELS["compressed-tensors"]
        self._bits = weights["num_bits"]
        group_size = {"group": weights.get("group_size"), "channel": PER_CHANNEL, "tensor": PER_TENSOR}
        container = Grid(self._bits, group_size[weights["strategy"]], weights.get("symmetric", True))
        self._grid = self._recorded or container
        self.float_linears = list(described.get("ignore") or [])

    def _read_bitnet(self, described: dict[str, Any]) -> None:
        if (described.get("linear_class"), described.get("quantization_mode")) != ("autobitlinear", "offline"):
            raise ValueError(
                f"{self.folder.name}: of BitNet's layers, those of `linear_class='autobitlinear'` and "
                "`quantization_mode='offline'` hold the scale itself; 'bitlinear' holds its rounded inverse."
            )
        self._bits, self._grid = 2, self._recorded or Grid(TERNARY, PER_TENSOR)
        self.act_bits, self.act_levels = 8, ACTIVATION_LEVELS["bitnet"]
        self.float_linears = list(described.get("modules_to_not_convert") or [])

    # -- tensors

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name][0], framework="pt") as file:
            return file.get_tensor(name)

    @cached_property
    def _infos(self) -> dict[str, LayerInfo]:
        found = {}
        for name, (_, shape, _) in self._files.items():
            module, _, part = name.rpartition(".")
            scale = self._files.get(module + ".weight_scale")
            if scale is None or part not in ("weight_packed", "weight"):
                continue
            out_features, in_features = shape[0] * (4 if self._bitnet else 1), shape[1]
            if part == "weight_packed":
                out_features, in_features = self._read(module + ".weight_shape").tolist()
                if shape[1] != -(-in_features * self._bits // 32):
                    raise ValueError(
                        f"{name} is {shape}, but {in_features} codes of {self._bits} bits take "
                        f"{-(-in_features * self._bits // 32)} words: the file was written by compressed-tensors older "
                        "than 0.18, which packed 3, 5, 6 and 7 bits differently. Merge again."
                    )
            found[module] = LayerInfo(
                out_features,
                in_features,
                self._grid,
                kind="linear",
                bias=module + ".bias" in self._files,
                dtype=scale[2],
                container_bits=self._bits,
            )
        return found

    def grids(self) -> dict[str, LayerInfo]:
        return dict(self._infos)

    def scale(self, name: str) -> torch.Tensor:
        info, scale = self._infos[name], self._read(name + ".weight_scale").float()
        if info.grid.group_size > 0:
            return scale.view(info.out_features, -1)
        scale = scale.reshape(-1, 1)
        if info.grid.group_size != PER_TENSOR:
            return scale
        if not torch.equal(scale, scale[:1].expand_as(scale)):
            raise ValueError(f"{name}: config.json records one scale per tensor, but the rows' scales differ.")
        return scale[:1]

    def layer(self, name: str) -> GridTensor:
        info = self._infos[name]
        if name + ".weight_packed" in self._files:
            codes = unpack(self._read(name + ".weight_packed"), self._bits, info.in_features)
        else:
            stored = self._read(name + ".weight")
            codes = bitnet.unpack(stored) if self._bitnet else stored
        scale, zero_point = self.scale(name), None
        if not info.grid.symmetric:
            packed = self._read(name + ".weight_zero_point")
            zero_point = unpack(packed.t().contiguous(), self._bits, info.out_features).t().contiguous()
        if info.grid.group_size == PER_TENSOR:
            zero_point = None if zero_point is None else zero_point[:1]
        if codes.min() < info.grid.qmin or codes.max() > info.grid.qmax:
            raise ValueError(
                f"{name} holds codes from {int(codes.min())} to {int(codes.max())}, outside of the grid that "
                f"config.json records ({info.grid.describe()}): the checkpoint is damaged or was edited."
            )
        return GridTensor(codes, scale, zero_point, info.grid)

    def floats(self, packed: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self._files:
            module, _, part = name.rpartition(".")
            if module not in self._infos or part not in (*_PARTS, "weight"):
                yield name, self._read(name)
            elif part in ("weight", "weight_packed") and module not in packed:
                yield module + ".weight", self.layer(module).dequantize(self._infos[module].dtype)


def _tensor_files(folder: Path) -> dict[str, tuple[Path, tuple[int, ...], torch.dtype]]:
    """Tensor name -> (file, shape, dtype), from the files' headers."""
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
    found = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    found[name] = (path, tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), torch.float32))
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is truncated or damaged ({error}). Copy or download it again.") from error
    return found


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
