"""Starting from a model that is quantized already: its grid becomes the configuration's, or the two contradict.

At step 0 the adapted model is the loaded one, so nothing of it may be rounded anew: bits, groups and zero points are
the checkpoint's, the scales' dtype is the first that holds them exactly, and layers that the checkpoint left float are
not quantized on the way.

Or its 8-bit codes are fixed-point numbers in steps of a narrower grid, which `preprocess_blockwise` has trained and
config.json records: they become an fx8 base, and the adapted model at step 0 is the one that was trained, rounded.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...formats.record import Record
from ...grid import SCALE_DTYPES, Grid, snap_scale
from ...modules.packed import QuantizedLinear
from ..common.layer import MergingLayer
from .config import LRQATConfig

_FIELDS = ("bits", "group_size", "symmetric")


def adopt_base(model: nn.Module, targets: dict[str, nn.Module], config: LRQATConfig) -> None:
    """Complete `config` by the grid of the targeted modules of `model` that are quantized already, if any.

    Raises:
        ValueError: `config` asks for another grid; the modules are on several grids; some of them are float.
    """
    packed = {name: module for name, module in targets.items() if isinstance(module, QuantizedLinear)}
    adapted: list[Any] = [module for module in targets.values() if isinstance(module, MergingLayer)]
    if not packed and not adapted:
        _refuse_lost_integers(model)
        config.adopt_defaults()
        return
    if not packed:
        if adapted[0].frozen.quantized_before:  # a second adapter
            frozen = adapted[0].frozen
            theirs = {name: getattr(frozen.grid, name) for name in _FIELDS}
            config.adopt(**theirs, scale_dtype=frozen.scale_dtype, downcast=frozen.downcast)
        return
    _refuse_float(targets, packed)
    grid = _the_grid(packed)
    bits = _fixed_point_bits(model) if grid.bits == 8 else None
    if bits is not None and config.adopt(bits=bits) and config.bits == 8:
        bits = None  # the codes themselves are asked for
    if bits is not None:
        grid = replace(grid, bits=bits)
        _check_fixed_point(packed, config, bits)
    config.adopt(downcast="int" if bits is None else "fx8")
    other = config.adopt(**{name: getattr(grid, name) for name in _FIELDS})
    narrower = other == ["bits"] and bits is None and config.bits < grid.bits
    if other and not (narrower and _all_on(packed, config.grid)):
        wanted, found = (", ".join(f"{n}={getattr(it, n)!r}" for n in other) for it in (config, grid))
        raise ValueError(
            f"The configuration asks for {wanted}, but the base model is quantized {'with' if bits is None else 'for'} "
            f"{found}. Leave these options out of the configuration, which then takes the base's grid; for another "
            "grid, start from the float model."
        )
    config.check_int8_activations()
    config.check_signed_scales()
    container = next(iter(packed.values())).bits if bits is None else bits
    if config.container_bits is None and container > config.bits:
        config.container_bits = container
    _adopt_scale_dtype(packed, config)


def is_fixed_point(model: nn.Module, target: nn.Module, config: LRQATConfig) -> bool:
    """Whether the codes of a module of `model` are fixed-point numbers in steps of `config`'s grid."""
    if not isinstance(target, QuantizedLinear) or target.grid.bits != 8 or config.bits == 8:
        return False
    return _fixed_point_bits(model) == config.bits


def _fixed_point_bits(model: Any) -> int | None:
    record = Record.of(getattr(model, "config", None))
    return None if record is None else record.fixed_point_bits


def _refuse_lost_integers(model: nn.Module) -> None:
    if _fixed_point_bits(model) is not None and not any(isinstance(m, QuantizedLinear) for m in model.modules()):
        raise ValueError(
            "The base model was trained block by block (`preprocess_blockwise`), but has been loaded as floats, in "
            "which its grid is lost. Load it with `peft_lrqat.load_quantized(...)`."
        )


def _check_fixed_point(packed: dict[str, QuantizedLinear], config: LRQATConfig, bits: int) -> None:
    if config.downcast not in (None, "fx8", "int"):
        raise ValueError(
            f"`downcast` is {config.downcast!r}, but the base model holds 8-bit fixed-point numbers. Use 'fx8', which "
            "keeps them, or 'int', which rounds them."
        )
    for name, layer in packed.items():
        zero_point = layer.zero_point
        if zero_point is not None and bool(zero_point.remainder(1 << (8 - bits)).any()):
            raise ValueError(
                f"config.json says that the 8-bit codes of the base model were trained for {bits} bits, but zero "
                f"points of {name!r} are none of that grid. Delete `fixed_point_bits` there, or take an intact "
                "checkpoint."
            )


def on_grid(layer: QuantizedLinear, grid: Grid) -> bool:
    """Whether a layer's codes and zero points lie within a grid's range."""
    weight = layer.grid_tensor()
    values = [weight.codes] if weight.zero_point is None else [weight.codes, weight.zero_point]
    return all(grid.qmin <= int(value.min()) and int(value.max()) <= grid.qmax for value in values)


def _all_on(packed: dict[str, QuantizedLinear], grid: Grid) -> bool:
    return all(on_grid(layer, grid) for layer in packed.values())


def _refuse_float(targets: dict[str, nn.Module], packed: dict[str, QuantizedLinear]) -> None:
    floats = [name for name in targets if name not in packed and not isinstance(targets[name], BaseTunerLayer)]
    if floats:
        shown = ", ".join(repr(name) for name in floats[:3])
        ends = sorted({name.rpartition(".")[2] for name in floats})
        raise ValueError(
            f"{len(floats)} of the targeted modules are float in this quantized model, e.g. {shown}. "
            "Rounding them would change the model that was loaded. Leave them out, for instance with "
            f"`exclude_modules={(ends if len(ends) < 6 and _only(ends, packed) else floats)!r}`."
        )


def _only(ends: list[str], packed: dict[str, QuantizedLinear]) -> bool:
    """Whether these last parts of names are those of float modules only."""
    return not any(name.rpartition(".")[2] in ends for name in packed)


def _the_grid(packed: dict[str, QuantizedLinear]) -> Grid:
    grids: dict[Grid, list[str]] = {}
    for name, layer in packed.items():
        grids.setdefault(layer.grid, []).append(name)
    if len(grids) > 1:
        listed = "; ".join(
            f"{grid.describe()}: {len(names)} modules, e.g. {names[0]!r}" for grid, names in grids.items()
        )
        raise ValueError(
            f"The targeted modules are on {len(grids)} different grids ({listed}). One adapter trains one grid: choose "
            "the modules of one of them with `target_modules` or `exclude_modules`. The others stay as they are, and "
            "merging keeps them."
        )
    return next(iter(grids))


def _adopt_scale_dtype(packed: dict[str, QuantizedLinear], config: LRQATConfig) -> None:
    scales = torch.cat([layer.weight_scale.detach().float().flatten().cpu() for layer in packed.values()])
    holds = [name for name in SCALE_DTYPES if torch.equal(snap_scale(scales, name), scales)]
    if not config.adopt(scale_dtype=holds[0]) or config.scale_dtype in holds:
        return
    change = ((snap_scale(scales, config.scale_dtype) - scales) / scales).abs().max().item()
    warnings.warn(
        f"`scale_dtype={config.scale_dtype!r}` does not hold the scales of the quantized base: they are rounded, by up "
        f"to {change:.1g} of their size, so the model at step 0 is not exactly the one that was loaded. "
        f"`scale_dtype={holds[0]!r}` (what None chooses) keeps them.",
        stacklevel=2,
    )
