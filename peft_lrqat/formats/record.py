"""What config.json says about the training, which no format has a place for: the grid, and the recipe.

A container may be wider than its grid (3-bit codes in 4-bit words), so the grid is recorded beside
`quantization_config`, under a key of its own. Engines ignore it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..grid import Grid

if TYPE_CHECKING:
    from ..tuners.common.config import GridConfig

KEY = "peft_lrqat"


def describe(config: GridConfig) -> dict[str, Any]:
    """The entry for a model merged from an adapter with this configuration."""
    return record(config.stored_grid, config.scale_dtype, config.recipe())


def record(grid: Grid, scale_dtype: str | None, recipe: str | None) -> dict[str, Any]:
    """The entry itself."""
    return {
        "bits": grid.bits,
        "group_size": grid.group_size,
        "symmetric": grid.symmetric,
        "scale_dtype": scale_dtype,
        "recipe": recipe,
    }


def recorded_grid(entry: dict[str, Any] | None) -> Grid | None:
    """The grid in an entry of config.json, None if there is none.

    Raises:
        ValueError: the entry describes no grid.
    """
    if not entry:
        return None
    try:
        return Grid(entry["bits"], entry["group_size"], entry["symmetric"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.json's {KEY!r} is {entry!r}, which describes no grid. Delete the entry.") from error
