"""What the formats in safetensors files share: the loop over layers, the config, and the checks of scales."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..grid import GridTensor
from .record import Record
from .shards import ShardWriter
from .source import LayerInfo, Source
from .writer import Loss, Problem, Settings, Writer, Written


@dataclass(frozen=True)
class Plan:
    """What is decided before the first layer is written. (A writer itself keeps nothing between calls.)

    Attributes:
        quantization_config: config.json's entry.
        container: a few words: "pack-quantized, 4 bits".
        details: what `tensors` needs of the format's own.
        metadata: strings for the files' headers; `tensors` may add to it.
    """

    quantization_config: dict[str, Any]
    container: str
    details: Any = None
    metadata: dict[str, str] = field(default_factory=dict)


class SafetensorsWriter(Writer):
    """A folder as transformers saves it: config.json, generation_config.json, model*.safetensors."""

    def packed(self, source: Source) -> dict[str, LayerInfo]:
        """The layers that the format holds as codes: nn.Linear. The others' weights become floats on their grid."""
        return {name: info for name, info in source.grids().items() if info.kind == "linear"}

    @abstractmethod
    def plan(self, source: Source, settings: Settings) -> Plan:
        """How the layers will be stored; `problems` found nothing in the way."""

    @abstractmethod
    def tensors(self, name: str, weight: GridTensor, info: LayerInfo, plan: Plan) -> dict[str, torch.Tensor]:
        """What the file holds for a layer, by the last part of its name."""

    def stored(self, name: str, weight: GridTensor, info: LayerInfo, settings: Settings, loss: Loss) -> GridTensor:
        """The nearest to `weight` that the format holds: itself, if everything fits."""
        return weight

    def write(self, source: Source, folder: Path, settings: Settings, progress: Callable[[str], None]) -> Written:
        packed, loss, plan = self.packed(source), Loss(), self.plan(source, settings)
        shards = ShardWriter(folder, settings.max_shard_size)
        written = Written(dense=[name for name in source.grids() if name not in packed], container=plan.container)
        for name, info in packed.items():
            weight = self.stored(name, source.layer(name), info, settings, loss)
            for part, tensor in self.tensors(name, weight, info, plan).items():
                shards.add(f"{name}.{part}", tensor)
                written.layer_bytes += tensor.nbytes
            written.weights += info.weights
            del weight
            progress(name)
        for name, tensor in source.floats(packed):
            shards.add(name, tensor)
        self.finish(shards, folder, source, plan)
        shards.close()
        written.loss = loss if loss.layers else None
        return written

    def finish(self, shards: ShardWriter, folder: Path, source: Source, plan: Plan) -> None:
        """Write the configuration files; a format may add to the shards' metadata."""
        config = copy.deepcopy(source.config)
        config.quantization_config = plan.quantization_config
        grids = {name: info.grid for name, info in self.packed(source).items()}
        most = Counter(grids.values()).most_common(1)[0][0]
        grids |= {source.modules[name]: grid for name, grid in grids.items() if name in source.modules}
        record = Record(
            most,
            source.scale_dtype,
            source.recipe,
            fixed_point_bits=source.fixed_point_bits,
            cache=source.cache,
            base=source.base,
            trainings=source.trainings,
        )
        record.with_layers(grids).put_into(config)
        source.save_code(folder, config)
        config.save_pretrained(folder)
        if source.generation_config is not None:
            source.generation_config.save_pretrained(folder)


def no_linear(source: Source, what: str) -> list[Problem]:
    """A problem if no quantized layer is an nn.Linear."""
    if any(info.kind == "linear" for info in source.grids().values()):
        return []
    kinds = sorted({info.kind for info in source.grids().values()})
    return [
        Problem(
            None,
            f"{what} packs nn.Linear layers only, and this model's quantized layers are {', '.join(kinds)}",
            "merge and save_pretrained, which writes a float checkpoint whose weights lie on the grid",
        )
    ]


def one_grid(source: Source) -> list[Problem]:
    """Problems of layers whose grid is not that of most: the formats' configuration describes one."""
    grids = [info.grid for info in source.grids().values() if info.kind == "linear"]
    most = max(grids, key=grids.count, default=None)
    return [
        Problem(name, f"its grid ({info.grid.describe()}) is not that of the other layers", "train one grid")
        for name, info in source.grids().items()
        if info.kind == "linear" and info.grid != most
    ]


def float_activations(source: Source, what: str) -> list[Problem]:
    """A problem if the model was trained with rounded activations, which the format does not round."""
    if not source.act_bits:
        return []
    bits = " and ".join(map(str, source.act_bits))
    reason = f"the model was trained with {bits}-bit activations, and {what} computes with float activations"
    return [Problem(None, reason, "use the format that it was trained for, or allow_inexact=True", inexact=True)]


def float_cache(source: Source, what: str) -> list[Problem]:
    """A problem if the model was trained with a KV cache that transformers is to round, which the format cannot say."""
    if source.cache is None or source.cache.rule != "transformers":
        return []
    reason = f"the KV cache was trained with {source.cache.describe()}, and transformers keeps it in floats with {what}"
    hint = "use format='compressed-tensors', train with kv_rule='vllm', or allow_inexact=True"
    return [Problem(None, reason, hint, inexact=True)]


def scale_problems(source: Source, dtypes: Mapping[str, torch.dtype]) -> list[Problem]:
    """Layers with a scale that cannot be held exactly. Scales are read only where the training does not tell.

    Args:
        dtypes: layer -> the dtype that its scales will be stored in.
    """
    problems = []
    for name, dtype in dtypes.items():
        kept = {torch.float16: ("auto", "fp16"), torch.bfloat16: ("auto", "bf16")}.get(dtype, ())
        if source.scale_dtype in kept or dtype == torch.float32:
            continue
        scale = source.scale(name)
        changed = scale.to(dtype).float() != scale
        if bool(changed.any()):
            reason = f"{int(changed.sum())} of {scale.numel()} scales are not exact in {str(dtype).split('.')[1]}"
            problems.append(Problem(name, reason, "train with scale_dtype='auto', or allow_inexact=True", inexact=True))
    return problems


def round_scale(name: str, weight: GridTensor, dtype: torch.dtype, settings: Settings, loss: Loss) -> GridTensor:
    """`weight` with scales that `dtype` holds.

    Raises:
        ValueError: a scale changes and `allow_inexact` is False.
    """
    scale = weight.scale.to(dtype).float()
    if torch.equal(scale, weight.scale):
        return weight
    if not settings.allow_inexact:
        raise ValueError(
            f"{name}: scales are not exact in {str(dtype).split('.')[1]}. Train with scale_dtype='auto', or pass "
            "allow_inexact=True."
        )
    rounded = replace(weight, scale=scale)
    loss.add(weight, rounded)
    return rounded


def container(info: LayerInfo, settings: Settings, widths: tuple[int, ...]) -> int:
    """Width of the stored codes: as asked, or as training chose if the format has it, or the narrowest that fits."""
    if settings.container_bits is not None:
        return settings.container_bits
    if info.container_bits in widths:
        return info.container_bits
    return min((width for width in widths if width >= info.grid.code_bits), default=0)


def container_problems(
    infos: dict[str, LayerInfo], settings: Settings, widths: tuple[int, ...], what: str
) -> list[Problem]:
    """Problems of the width of codes."""
    problems = []
    for name, info in infos.items():
        least, asked = info.grid.code_bits, container(info, settings, widths)
        allowed = [width for width in widths if width >= least]
        if not allowed:
            reason = f"codes of {least} bits fit in none of {what}'s containers {widths}"
            problems.append(Problem(name, reason, f"train with bits <= {max(widths)}"))
        elif asked not in allowed:
            reason = f"container_bits={asked}, but {what} holds codes of {least} bits in {allowed}"
            problems.append(Problem(name, reason, f"container_bits={allowed[0]}"))
    return problems
