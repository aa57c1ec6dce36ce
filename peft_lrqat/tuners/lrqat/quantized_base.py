"""Starting from a model that is quantized already: its grid becomes the configuration's, or the two contradict.

Bits, groups and zero points are the checkpoint's, the scales' dtype is the first that holds them exactly, and the base
is kept as packed integers, or as the fixed-point numbers that it holds.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ...grid import snap_scale
from ..common.layer import MergingLayer
from ..common.quantized_base import FIELDS, check_grid, grid_of_base, is_fixed_point, packed_targets, scales_of
from .config import LRQATConfig


def adopt_base(model: nn.Module, targets: dict[str, nn.Module], config: LRQATConfig) -> None:
    """Complete `config` by the grid of the targeted modules of `model` that are quantized already, if any.

    Raises:
        ValueError: `config` asks for another grid; the modules are on several grids, or on the ternary one; some of
            them are float.
    """
    packed = packed_targets(model, targets)
    adapted: list[Any] = [module for module in targets.values() if isinstance(module, MergingLayer)]
    if not packed and not adapted:
        config.adopt_defaults()
        return
    if not packed:
        if adapted[0].frozen.quantized_before:  # a second adapter
            frozen = adapted[0].frozen
            theirs = {name: getattr(frozen.grid, name) for name in FIELDS}
            signed = next(iter(adapted[0].adapter_options.values())).signed_scales
            config.adopt(**theirs, signed_scales=signed, scale_dtype=frozen.scale_dtype, downcast=frozen.downcast)
        return
    grid = grid_of_base(model, packed, eight_bits=False)
    if grid.ternary:
        raise ValueError(
            f"The base model is quantized to ternary weights (module {next(iter(packed))!r} and others), and LR-QAT's "
            "grids have 2 to 8 bits. Train it with `LowBitSRConfig(bits=1.58, ...)`; for LR-QAT, start from the float "
            "model."
        )
    if config.adopt(bits=grid.bits) and config.bits == 8:
        grid = grid_of_base(model, packed, eight_bits=True)
    scales, holds = scales_of(packed)
    config.adopt(group_size=grid.group_size, symmetric=grid.symmetric)
    config.adopt(signed_scales=grid.symmetric and bool((scales < 0).any()))
    fixed_point = any(is_fixed_point(model, layer, config) for layer in packed.values())
    config.adopt(downcast="fx8" if fixed_point else "int")
    check_grid(model, packed, config)
    if fixed_point and config.downcast not in ("fx8", "int"):
        raise ValueError(
            f"`downcast` is {config.downcast!r}, but the base model holds 8-bit fixed-point numbers. Use 'fx8', which "
            "keeps them, or 'int', which rounds them."
        )
    _adopt_scale_dtype(scales, holds, config)


def _adopt_scale_dtype(scales: torch.Tensor, holds: list[str], config: LRQATConfig) -> None:
    if not config.adopt(scale_dtype=holds[0]) or config.scale_dtype in holds:
        return
    change = ((snap_scale(scales, config.scale_dtype) - scales) / scales).abs().max().item()
    warnings.warn(
        f"`scale_dtype={config.scale_dtype!r}` does not hold the scales of the quantized base: they are rounded, by up "
        f"to {change:.1g} of their size, so the model at step 0 is not exactly the one that was loaded. "
        f"`scale_dtype={holds[0]!r}` (what None chooses) keeps them.",
        stacklevel=2,
    )
