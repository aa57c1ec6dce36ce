"""Starting from a model that is quantized already: what both methods ask of it.

At step 0 the adapted model is the loaded one, so nothing of it may be rounded anew, and layers that the checkpoint left
float are not quantized on the way.

Its 8-bit codes may also be fixed-point numbers in steps of a narrower grid, which `preprocess_blockwise` has trained
and config.json records. The adapted model at step 0 is then the one that was trained, rounded to that grid.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...formats.record import Record
from ...grid import SCALE_DTYPES, Grid, snap_scale
from ...modules.packed import QuantizedLinear
from ...ops.activations import describe_activations

#: The fields of a grid.
FIELDS = ("bits", "group_size", "symmetric")


def packed_targets(model: nn.Module, targets: dict[str, nn.Module]) -> dict[str, QuantizedLinear]:
    """The targeted modules of `model` that are quantized already.

    Raises:
        ValueError: some are, and others are float; or the model was trained block by block and loaded as floats.
    """
    packed = {name: module for name, module in targets.items() if isinstance(module, QuantizedLinear)}
    if packed:
        _refuse_float(targets, packed)
    elif not any(isinstance(module, BaseTunerLayer) for module in targets.values()):
        _refuse_lost_integers(model)
    return packed


def grid_of_base(model: nn.Module, packed: dict[str, QuantizedLinear], eight_bits: bool) -> Grid:
    """The grid that `packed` layers of `model` are on, or that they were trained for where they are in fixed point.

    Args:
        eight_bits: whether 8-bit codes are asked for as they are.

    Raises:
        ValueError: the layers are on several grids.
    """
    grid, bits = _the_grid(packed), fixed_point_bits(model)
    return grid if bits is None or grid.bits != 8 or eight_bits else replace(grid, bits=bits)


def check_grid(model: nn.Module, packed: dict[str, QuantizedLinear], config: Any) -> None:
    """Set the container of the checkpoint to that of the base, where it is wider than the grid.

    Raises:
        ValueError: `config` asks for another grid than that of the base.
    """
    grid = grid_of_base(model, packed, config.bits == 8)
    fixed_point = any(is_fixed_point(model, layer, config) for layer in packed.values())
    other = [name for name in FIELDS if getattr(config.grid, name) != getattr(grid, name)]
    narrower = other == ["bits"] and grid == _the_grid(packed) and config.bits < grid.bits
    if other and not (narrower and all(on_grid(layer, config.grid) for layer in packed.values())):
        wanted, found = (", ".join(f"{n}={getattr(it, n)!r}" for n in other) for it in (config.grid, grid))
        how = (
            "Leave these options out of the configuration, which then takes the base's grid"
            if hasattr(config, "adopt")
            else "Ask for the grid of the base"
        )
        raise ValueError(
            f"The configuration asks for {wanted}, but the base model is quantized "
            f"{'with' if grid == _the_grid(packed) else 'for'} {found}. {how}; for another grid, start from the float "
            "model."
        )
    if fixed_point:
        _check_zero_points(packed, config.bits)
    config.check_activations()
    config.check_signed_scales()
    _check_same_activations(packed, config)
    container = config.grid.code_bits if fixed_point else next(iter(packed.values())).bits
    if (
        config.container_bits is None
        and config.export_format != "bitnet"
        and config.stored_grid == config.grid
        and container > config.grid.code_bits
    ):
        config.container_bits = container


def _check_same_activations(packed: dict[str, QuantizedLinear], config: Any) -> None:
    """Raise ValueError if the base rounds inputs, and `config` would round them otherwise."""
    for name, layer in packed.items():
        wanted = config.activations_of(name)
        if layer.activations is not None and layer.activations != wanted:
            raise ValueError(
                f"Module {name!r} of the quantized base rounds its input ({layer.activations.describe()}, rule "
                f"{layer.activations.rule!r}), but with this configuration it would have {describe_activations(wanted)}"
                f"{'' if wanted is None else f' (rule {wanted.rule!r})'}. Give the base's: "
                f"`act_bits={layer.activations.bits}`, with `act_group_size`, `act_bits_pattern` and `act_rule` as it "
                "was trained; or start from the float model."
            )


def is_fixed_point(model: nn.Module, target: nn.Module, config: Any) -> bool:
    """Whether the codes of a module of `model` are fixed-point numbers in steps of `config`'s grid."""
    if not isinstance(target, QuantizedLinear) or target.grid.bits != 8 or config.bits == 8:
        return False
    return fixed_point_bits(model) == config.bits


def fixed_point_bits(model: Any) -> int | None:
    """For how many bits the 8-bit codes of a model were trained, if config.json records it."""
    record = Record.of(getattr(model, "config", None))
    return None if record is None else record.fixed_point_bits


def scales_of(packed: dict[str, QuantizedLinear]) -> tuple[torch.Tensor, list[str]]:
    """All scales, fp32 in one dimension, and the `scale_dtype`s that hold them exactly."""
    scales = torch.cat([layer.weight_scale.detach().float().flatten().cpu() for layer in packed.values()])
    return scales, [name for name in SCALE_DTYPES if torch.equal(snap_scale(scales, name), scales)]


def _refuse_lost_integers(model: nn.Module) -> None:
    if fixed_point_bits(model) is not None and not any(isinstance(m, QuantizedLinear) for m in model.modules()):
        raise ValueError(
            "The base model was trained block by block (`preprocess_blockwise`), but has been loaded as floats, in "
            "which its grid is lost. Load it with `peft_lrqat.load_quantized(...)`."
        )


def _check_zero_points(packed: dict[str, QuantizedLinear], bits: int) -> None:
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
