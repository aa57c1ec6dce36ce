"""What a conversion has done to a model, in a line: how much is on the grid, how large that is, what stays float."""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter
from typing import Any, NamedTuple

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...checkpoint.serving import Serving, serving
from ...files import bytes_in_words
from ...formats import compressed_tensors
from ...modules.architecture import loading, skeleton_of
from ...modules.experts import Experts
from ...modules.kv_cache import rounding_of
from ...modules.packed import MERGED
from .layer import MergingLayer
from .progress import speaks


class _Console(logging.Handler):
    """Writes to stderr where the program has not set up logging, in which Python drops what is below a warning."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.root.handlers:
            print(self.format(record), file=sys.stderr)


_LOGGER = logging.getLogger("peft_lrqat")
_LOGGER.addHandler(_Console())
if _LOGGER.level == logging.NOTSET:
    _LOGGER.setLevel(logging.INFO)


class Summary(NamedTuple):
    """Numbers of weights, except where a name says bytes."""

    grid: str
    layers: int  # on the grid, of this conversion or before
    experts: int  # likewise, of mixtures, whose projections do not count as layers
    weights: int  # in them
    total: int  # in the model, without adapters
    tables: int  # float: embeddings and the output layer
    matrices: dict[str, int]  # other float weights of two and more dimensions, by the last name of their module
    bytes_before: int  # of the layers with adapters, in the dtype that they were in
    bytes_after: int  # of their integers and scales
    scales: int  # chosen for float weights
    lossless: int  # of those, which gave every weight back

    @property
    def mostly_float(self) -> bool:
        """Whether less than half of it is on the grid; embeddings and the output layer do not count."""
        return sum(self.matrices.values()) > self.weights

    def __str__(self) -> str:
        experts = f" and {self.experts} experts" if self.experts else ""
        parts = [
            f"{self.layers} layers{experts} on the grid ({self.grid}), {_share(self.weights, self.total)} of the "
            f"model's {_count(self.total)} weights: "
            f"{bytes_in_words(self.bytes_before, self.bytes_after)} became "
            f"{bytes_in_words(self.bytes_after, self.bytes_before)}."
        ]
        if self.lossless > 0.1 * self.scales:
            parts.append(f"{_share(self.lossless, self.scales)} of the groups lay on the grid already.")
        if self.tables or self.matrices:
            names = [f"{name} ({_count(size)})" for name, size in self._largest()]
            parts.append(f"Float stay: {', '.join(names)}.")
        return " ".join(parts)

    def _largest(self) -> list[tuple[str, int]]:
        tables = [("embeddings and output layer", self.tables)] if self.tables else []
        return sorted([*tables, *self.matrices.items()], key=lambda item: -item[1])[:8]


def summarize(model: nn.Module, grid: str) -> Summary:
    """Count the weights of a model, adapters left out.

    Args:
        grid: how the grid is described.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head = getattr(head, "original_module", head)  # in PEFT's wrapper
    layers = experts = weights = total = tables = before = after = scales = lossless = 0
    matrices: Counter[str] = Counter()
    seen: set[int] = set()
    inside: tuple[str, ...] = ()
    of_experts: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):  # what an adapter trains beside its layers
            inside += (f"{name}.modules_to_save", f"{name}.token_adapter.trainable_tokens_delta")
        if isinstance(module, Experts):
            experts += module.num_experts
            of_experts += (name + ".",)
        if isinstance(module, MergingLayer):
            layer: Any = module
            frozen = layer.frozen
            size = frozen.out_features * frozen.in_features
            before += size * frozen.compute_dtype.itemsize
            found = getattr(frozen, "lossless", None) or (0, 0)
            lossless, scales = lossless + found[0], scales + found[1]
            after += sum(_stored_bytes(parameter) for parameter in layer.parameters())
        elif isinstance(module, MERGED):
            size = module.out_features * module.in_features
        else:
            for key, parameter in module._parameters.items():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                total += parameter.numel()
                if isinstance(module, nn.Embedding) or module is head:
                    tables += parameter.numel()
                elif parameter.ndim > 1:
                    called = name.removesuffix(".original_module").rpartition(".")[2]
                    matrices[called if key == "weight" else key] += parameter.numel()
            continue
        inside += (name + ".",)
        layers += not name.startswith(of_experts)
        weights, total = weights + size, total + size
    return Summary(grid, layers, experts, weights, total, tables, dict(matrices), before, after, scales, lossless)


def report(model: nn.Module, config: Any) -> None:
    """Say what became of a model (logger "peft_lrqat", level INFO), or warn of it where most of it stayed float.

    For an adapter that is loaded, and in all but the first process of a machine, the level is DEBUG, and there is no
    warning.
    """
    summary = summarize(model, config.grid.describe())
    said = config._adapter_shapes is None and speaks()
    warned = said and summary.mostly_float
    _LOGGER.log(logging.INFO if said and not warned else logging.DEBUG, "%s: %s", config.method, summary)
    if said:
        _report_serving(model, config)
    if warned:
        warnings.warn(
            f"Most of the model stays float. {config.method}: {summary} `target_modules='all-linear'` takes all linear "
            "layers and, with LRQATConfig, the experts of mixtures. Other weights (of convolutions) stay float.",
            stacklevel=2,
        )


def _report_serving(model: nn.Module, config: Any) -> None:
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, MergingLayer)]
    stored = [(config.stored_grid, config.stored_bits, config.activations_of(layer.name)) for layer in layers]
    cache, problem = rounding_of(model), ""
    if serving(config.export_format, stored, cache).notes:
        needs = loading(skeleton_of(model), [layer.name for layer in layers])
        problem = compressed_tensors.loading_problem(stored, needs, cache)
    served = serving(config.export_format, stored, cache, problem)
    say_how_to_serve(config, served, "" if cache is None else f"the KV cache has {cache.describe()}.")


def say_how_to_serve(config: Any, served: Serving, before: str = "") -> None:
    """Say what engines do with rounded activations and a rounded KV cache, where there are any.

    Args:
        before: a sentence, or nothing.
    """
    if served.notes:
        _LOGGER.info("%s: %s", config.method, " ".join(filter(None, (before, *served.notes))))


def _stored_bytes(parameter: Any) -> int:
    packed = getattr(parameter, "packed", None)  # of a low-bit weight
    if packed is not None:
        return packed.nbytes + parameter.scale.nbytes
    return 0 if parameter.is_floating_point() else parameter.nbytes


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %"


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else str(number)
