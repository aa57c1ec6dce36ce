"""What config.json says about the training, which no format has a place for: the grid, and the recipe.

A container may be wider than its grid (3-bit codes in 4-bit words), so the grid is recorded beside
`quantization_config`, under a key of its own. Engines ignore it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..grid import Grid

#: The key in config.json.
KEY = "peft_lrqat"


@dataclass(frozen=True)
class Record:
    """How the weights of a checkpoint were trained.

    Attributes:
        grid: what they lie on.
        scale_dtype: what the scales are exact in (`grid.SCALE_DTYPES`), None if unknown.
        recipe: how they were trained, in Markdown, None if unknown.
    """

    grid: Grid
    scale_dtype: str | None = None
    recipe: str | None = None

    def entry(self) -> dict[str, Any]:
        """The value in config.json."""
        return {
            "bits": self.grid.bits,
            "group_size": self.grid.group_size,
            "symmetric": self.grid.symmetric,
            "scale_dtype": self.scale_dtype,
            "recipe": self.recipe,
        }

    @classmethod
    def read(cls, entry: dict[str, Any] | None) -> Record | None:
        """The record in an entry of config.json, None if there is none.

        Raises:
            ValueError: the entry describes no grid.
        """
        if not entry:
            return None
        try:
            grid = Grid(entry["bits"], entry["group_size"], entry["symmetric"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"config.json's {KEY!r} is {entry!r}, which describes no grid. Delete the entry."
            ) from error
        return cls(grid, entry.get("scale_dtype"), entry.get("recipe"))

    @classmethod
    def of(cls, config: Any) -> Record | None:
        """The record in a model's configuration, None if there is none. Raises ValueError as `read` does."""
        return cls.read(getattr(config, KEY, None))

    def put_into(self, config: Any) -> None:
        """Set the entry of a model's configuration, which `save_pretrained` writes to config.json."""
        setattr(config, KEY, self.entry())
