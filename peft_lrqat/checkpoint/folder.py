"""A `Source` over a checkpoint on disk, read tensor by tensor; the model's weights are never built.

`formats/reading.py` knows what a layer is and what its tensors mean. This file has what concerns the folder: which
files count, whether the model that config.json describes is there as a whole, and whether every layer's small tensors
are sound. All of that is checked when the folder is opened, before anything is done with it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from ..files import read_json
from ..formats import compressed_tensors, reading
from ..formats.record import KEY, Record
from ..formats.scheme import Scheme
from ..formats.shards import Entry, read_headers
from ..formats.source import LayerInfo, Source
from ..grid import Grid, GridTensor
from ..modules.architecture import (
    expose_experts,
    float_names,
    loaded_modules,
    loaded_names,
    loading,
    own_names,
    tensor_names,
)
from . import hub
from .code import copy_code, read_config, without_weights
from .damage import check_counts, naming
from .engines import JOINS_EXPERTS

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_INDEX = 1 << 26  # bytes; a million tensors take that much


class FolderSource(Source):
    """A folder with config.json and safetensors files in one of the formats that can be read.

    Attributes:
        format: `quant_method` of config.json.
        quantization: its `quantization_config`.
        file_group: inputs that share a stored scale in the first layer; -1: all. (The grid's may be larger, with the
            scale repeated.)
        files: tensor name, as files of the architecture have it -> entry.
        named: name of a module -> what this folder calls it, where that is another.
        trust_remote_code: as given.
    """

    def __init__(self, folder: Path, config: Any = None, trust_remote_code: bool = False) -> None:
        """
        Args:
            config: the model's configuration where it is at hand; None: that of config.json.
            trust_remote_code: whether Python files in the folder may be run.

        Raises:
            ValueError: the checkpoint is float, in another format, uses a part of it that has no exact counterpart, is
                incomplete or damaged.
        """
        described = read_json(folder / "config.json")
        quantization = described.get("quantization_config", described.get("compression_config"))
        if quantization is None:
            raise ValueError(
                f"The checkpoint in {str(folder)!r} is float. What can be read: {', '.join(reading.METHODS)}, and "
                "adapters of LR-QAT and low-bit SR."
            )
        self.folder, self.origin = folder, hub.called(folder) or folder.resolve().name
        if not isinstance(quantization, dict):
            raise ValueError(f"`quantization_config` in config.json of {str(folder)!r} is {quantization!r}, no entry.")
        self.quantization = quantization
        self.files, paths, metadata = _tensor_files(folder)
        check_counts(described, len(self.files))
        scheme_of = reading.describe(quantization, metadata)
        self.format: str = quantization["quant_method"]
        record = Record.read(described.get(KEY))
        if record is not None:
            self.recipe, self.scale_dtype = record.recipe, record.scale_dtype
            self.fixed_point_bits = record.fixed_point_bits
            self.base, self.trainings = record.base, record.trainings
        self.cache = reading.cache_rounding(quantization, record)
        self.trust_remote_code = trust_remote_code
        self.config = read_config(folder, described, trust_remote_code) if config is None else copy.deepcopy(config)
        for known in ("quantization_config", KEY):
            if hasattr(self.config, known):
                delattr(self.config, known)
        if (folder / "generation_config.json").exists():
            self.generation_config = GenerationConfig.from_pretrained(folder)
        if (folder / "tokenizer_config.json").exists():
            self.tokenizer = str(folder)
        self.tied = {}
        skeleton = without_weights(self.config, trust_remote_code)
        own = own_names(skeleton, self.files)
        self.files = {own.tensors.get(name, name): entry for name, entry in self.files.items()}
        self._paths = {own.tensors.get(name, name): (path, name) for name, path in paths.items()}
        stored = reading.quantized_modules(self.format, self.files)
        if not stored:
            raise ValueError(f"The checkpoint in {str(folder)!r} has no quantized layer.")
        if skeleton is not None:
            with naming(folder):
                expose_experts(skeleton, stored)
        called = loaded_modules(skeleton, stored)
        self.modules = {name: inside for name, inside in called.items() if name != inside}
        self.named = own.modules
        places = {name: i for i, (name, _) in enumerate(skeleton.named_modules() if skeleton is not None else ())}
        self._layers = {
            name: self._layer(
                name, stored[name], scheme_of(*dict.fromkeys((own.modules.get(name, name), called[name]))), record
            )
            for name in sorted(stored, key=lambda name: places.get(called[name], len(places)))
        }
        self.float_linears = self._float_linears(skeleton)
        self._spare = set() if skeleton is None else self._check_whole(skeleton)
        self.loading = loading(skeleton, called.values())
        self.file_group = next(iter(self._layers.values())).scheme.group_size or -1

    def _layer(self, name: str, parts: dict[str, Entry], scheme: Scheme, record: Record | None) -> _Layer:
        """A layer whose small tensors have been read and found sound."""
        tensors = _Tensors({part: self._paths[f"{name}.{part}"] for part in parts if part != "bias"})
        reading.check_parts(scheme, parts, name)
        try:
            sizes = {part: entry.shape for part, entry in parts.items()}
            out_features, in_features = reading.READERS[scheme.method].shape(scheme, sizes, tensors.__getitem__)
        except (KeyError, ValueError) as error:
            found = {part: entry.shape for part, entry in parts.items()}
            raise self._refuse(f"layer {name!r} cannot be read from {found}: {error} is missing or damaged.") from error
        if not (isinstance(out_features, int) and isinstance(in_features, int) and out_features > 0 < in_features):
            raise self._refuse(f"layer {name!r} is said to have {out_features} x {in_features} weights.")
        recorded = None if record is None else record.grid_of(name)
        scales = reading.read_scales(scheme, tensors, out_features, in_features, name, recorded)
        dtype = self.config.dtype or scales.dtype
        info = LayerInfo(
            out_features, in_features, scales.grid, "linear", "bias" in parts, dtype, scheme.bits, scheme.activations
        )
        return _Layer(scheme, info, tensors, recorded)

    def _refuse(self, problem: str) -> ValueError:
        return ValueError(f"{str(self.folder)!r}: {problem}")

    def _float_linears(self, skeleton: nn.Module | None) -> list[str]:
        if skeleton is not None:
            inside = {self.modules.get(name, name) for name in self._layers}
            return float_names(skeleton, dict(skeleton.named_modules()), inside)
        # an architecture that is not transformers' own: matrices that are not quantized may be such modules
        names = (name.removesuffix(".weight") for name, e in self.files.items() if len(e.shape) == 2)
        return [name for name in names if name + ".weight" in self.files and name not in self._layers]

    def _check_whole(self, skeleton: Any) -> set[str]:
        """Raise ValueError unless the files hold the whole model, in its shapes.

        Returns:
            Names of tensors that the model has no place for and may be left out: biases of zeros, which GPTQ's files
            hold for layers without one.
        """
        parameters, aliases = _parameters(skeleton)
        found = {name: entry.shape for name, entry in self.files.items() if not self._belongs(name)}
        found |= {name + ".weight": (la.info.out_features, la.info.in_features) for name, la in self._layers.items()}
        inside = loaded_names(skeleton, found)
        places = {inside[name]: name for name in found}
        kind = type(skeleton).__name__
        modules = dict(skeleton.named_modules())
        called = {name: self.modules.get(name, name) for name in self._layers}
        strangers = [name for name in self._layers if not isinstance(modules.get(called[name]), nn.Linear)]
        if strangers:
            raise self._refuse(
                f"it holds quantized weights for {len(strangers)} modules that are no nn.Linear in {kind}, e.g. "
                f"{strangers[:3]}."
            )
        if tied := [name for name in called.values() if len(aliases.get(name + ".weight", [])) > 1]:
            others = [name for name in aliases[tied[0] + ".weight"] if name != tied[0] + ".weight"]
            raise self._refuse(
                f"it holds quantized codes for {tied[0]!r}, whose weight is tied to {others[0]!r} in {kind}. Untie it: "
                "set `tie_word_embeddings` to false in config.json."
            )
        absent = [name for name in parameters if not any(alias in places for alias in aliases.get(name, [name]))]
        in_files = tensor_names(skeleton, {name: parameters[name] for name in absent})
        changed = {name: parameters[name] for name in absent if in_files[name] is None}  # cut or joined in files
        expected = {name: tuple(parameters[place].shape) for place, name in places.items() if place in parameters}
        expected |= {name: tuple(t.shape) for name, t in revert_weight_conversion(skeleton, changed).items()}
        missing = [in_files[name] or name for name in absent if name not in changed]
        missing += [name for name in expected if name not in found]
        if missing:
            raise self._refuse(
                f"{len(missing)} tensors of {kind} are missing, e.g. {', '.join(missing[:3])}. The checkpoint is "
                "incomplete: download or write it again."
            )
        wrong = [name for name, size in expected.items() if found[name] != size]
        if wrong:
            name = wrong[0]
            raise self._refuse(
                f"{name!r} has shape {found[name]}, but {kind} with this config.json needs {expected[name]}. The "
                "checkpoint is damaged, or its config.json is another model's."
            )
        spare = {f"{name}.bias" for name in self._layers if f"{name}.bias" in found and f"{name}.bias" not in expected}
        for name in spare:
            if bool(self._read(name).any()):
                raise self._refuse(f"it holds a bias {name!r}, but the layer in {kind} has none.")
        return spare

    def _belongs(self, name: str) -> bool:
        """Whether a tensor is part of a quantized weight."""
        module, _, part = name.rpartition(".")
        return module in self._layers and part in reading.READERS[self.format].PARTS

    def _read(self, name: str) -> torch.Tensor:
        return _read(*self._paths[name])

    # -- a source

    def save_code(self, folder: Path, config: Any) -> None:
        copy_code(self.folder, folder)

    def grids(self) -> dict[str, LayerInfo]:
        return {name: layer.info for name, layer in self._layers.items()}

    def scale(self, name: str) -> torch.Tensor:
        stored, info = self._layers[name], self._layers[name].info
        size = (info.out_features, info.in_features)
        with naming(self.folder):
            return reading.read_scales(stored.scheme, stored.tensors, *size, name, stored.recorded).scale

    def zero_point(self, name: str) -> torch.Tensor | None:
        stored, info = self._layers[name], self._layers[name].info
        size = (info.out_features, info.in_features)
        with naming(self.folder):
            return reading.read_scales(stored.scheme, stored.tensors, *size, name, stored.recorded).zero_point

    def layer(self, name: str) -> GridTensor:
        stored, info = self._layers[name], self._layers[name].info
        size = (info.out_features, info.in_features)
        with naming(self.folder):
            return reading.read(stored.scheme, stored.tensors, *size, name, stored.recorded)

    def problem(self) -> str:
        """Why transformers cannot load the checkpoint, or nothing."""
        if self.format != compressed_tensors.NAME:
            return JOINS_EXPERTS if self.expert_parts() else ""
        infos = self.grids().values()
        stored = [(info.grid, info.container_bits, info.activations) for info in infos]
        return compressed_tensors.stored_problem(self.quantization, stored, self.loading)

    def expert_parts(self) -> set[str]:
        """What the files call the quantized parts of an expert ("gate_proj"); none where no expert is quantized."""
        called = [self.named.get(name, name) for name in self._layers]
        return {name.rpartition(".")[2] for name in called if re.search(r"\.experts\.\d+\.", name)}

    def layer_bytes(self) -> int:
        """Bytes of the quantized weights in the files, scales included."""
        return sum(entry.nbytes for name, entry in self.files.items() if self._belongs(name))

    def total_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(entry.nbytes for entry in self.files.values())

    def floats(self, packed: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.files:
            if not self._belongs(name) and name not in self._spare:
                yield name, self._read(name)
        for name, stored in self._layers.items():
            if name not in packed:
                yield name + ".weight", self.layer(name).dequantize(stored.info.dtype)


@dataclass(frozen=True)
class _Layer:
    """A quantized layer of the folder."""

    scheme: Scheme
    info: LayerInfo
    tensors: _Tensors
    recorded: Grid | None


class _Tensors(Mapping[str, torch.Tensor]):
    """A layer's tensors, by the last part of their names; each is read when it is asked for."""

    def __init__(self, paths: dict[str, tuple[Path, str]]) -> None:
        """
        Args:
            paths: part -> the file, and the tensor's name in it.
        """
        self._paths = paths

    def __getitem__(self, part: str) -> torch.Tensor:
        return _read(*self._paths[part])

    def __contains__(self, part: object) -> bool:
        return part in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _read(path: Path, name: str) -> torch.Tensor:
    with naming(path), safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _parameters(skeleton: Any) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """The parameters that files must hold; and, for those that are tied, name -> the names of which one is enough."""
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    together: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        together.setdefault(id(parameter), []).append(name)
    aliases = {name: names for names in together.values() if len(names) > 1 for name in names}
    spared = [*(skeleton._keys_to_ignore_on_load_missing or ()), *(skeleton._keys_to_ignore_on_save or ())]
    needed = {
        name: parameter.detach()
        for name, parameter in parameters.items()
        if not any(re.search(pattern, name) for pattern in spared)
    }
    return needed, aliases


def _tensor_files(folder: Path) -> tuple[dict[str, Entry], dict[str, Path], dict[str, str]]:
    """Tensor name -> entry, and -> the file that holds it; the files' metadata.

    The files are those that transformers would load: model.safetensors, or else those that the index names. Others in
    the folder (a backup, an older shard) do not count.
    """
    index, weight_map = folder / _INDEX, None
    if (folder / _SINGLE).exists():
        paths = [folder / _SINGLE]
    elif index.exists():
        weight_map = read_json(index, _LARGEST_INDEX).get("weight_map") or {}
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"`weight_map` of {str(index)!r} does not map tensors to files. Download it again.")
        paths = [folder / name for name in sorted(set(weight_map.values()))]
        if outside := [path.name for path in paths if path.parent != folder]:
            raise ValueError(f"{str(index)!r} names files outside of its folder, e.g. {outside[0]!r}.")
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            raise ValueError(f"{index.name} of {str(folder)!r} names {', '.join(missing)}, which do not exist.")
    else:
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        hint = f" It has {', '.join(others[:3])}, but no {_INDEX} that names them." if others else ""
        raise ValueError(f"The folder {str(folder)!r} holds no {_SINGLE}.{hint}")
    return read_headers(paths, weight_map)
