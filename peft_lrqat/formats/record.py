"""What config.json says about the training, which no format has a place for: the grid, and the recipe.

A container may be wider than its grid (3-bit codes in 4-bit words), so the grid is recorded beside
`quantization_config`, under a key of its own. Engines ignore it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..grid import Grid
from ..ops.kv_cache import CacheRounding

#: The key in config.json.
KEY = "peft_lrqat"
#: What is said of a training, in the order of a model card's rows. JSON files of PEFT and transformers sort them.
ROWS = ("training", "evaluation", "integers")
#: The entry of a training that is no row of a model card, but a repository of the Hub.
DATASET = "dataset"


@dataclass(frozen=True)
class Record:
    """How the weights of a checkpoint were trained.

    Attributes:
        grid: what they lie on.
        scale_dtype: what the scales are exact in (`grid.SCALE_DTYPES`), None if unknown.
        recipe: how they were trained, in plain text, None if unknown.
        others: layer -> its grid, for layers that lie on another one.
        fixed_point_bits: bits of a narrower grid, if the 8-bit codes are fixed-point numbers in its steps, from which
            LR-QAT starts (`preprocess_blockwise`). None: they are plain codes.
        cache: how keys and values are rounded, None: they are not.
        base: what the base model is called: a repository of the Hub, or the last part of a path. None if unknown.
        trainings: what Trainers have done, in order: each of `ROWS` that is known -> Markdown, and `DATASET`.
    """

    grid: Grid
    scale_dtype: str | None = None
    recipe: str | None = None
    others: Mapping[str, Grid] = field(default_factory=dict)
    fixed_point_bits: int | None = None
    cache: CacheRounding | None = None
    base: str | None = None
    trainings: Sequence[Mapping[str, str]] = ()

    def grid_of(self, layer: str) -> Grid:
        """What a layer lies on."""
        return self.others.get(layer, self.grid)

    def with_layers(self, layers: Mapping[str, Grid]) -> Record:
        """The same record of a model with these layers, which may lie on several grids."""
        return replace(self, others={name: grid for name, grid in layers.items() if grid != self.grid})

    def entry(self) -> dict[str, Any]:
        """The value in config.json."""
        found = {**_fields(self.grid), "scale_dtype": self.scale_dtype, "recipe": self.recipe}
        if self.fixed_point_bits is not None:
            found["fixed_point_bits"] = self.fixed_point_bits
        if self.cache is not None:
            found["kv_cache"] = self.cache.entry()
        if self.base is not None:
            found["base"] = self.base
        if self.trainings:
            found["trainings"] = [dict(training) for training in self.trainings]
        if self.others:
            alike: dict[Grid, list[str]] = {}
            for name, grid in self.others.items():
                alike.setdefault(grid, []).append(name)
            found["others"] = [{**_fields(grid), "layers": names} for grid, names in alike.items()]
        return found

    @classmethod
    def read(cls, entry: dict[str, Any] | None) -> Record | None:
        """The record in an entry of config.json, None if there is none.

        Raises:
            ValueError: the entry describes no grid, or one that does not exist.
        """
        if not entry:
            return None
        try:
            grid = _grid(entry)
            others = {name: _grid(part) for part in entry.get("others") or [] for name in part["layers"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"config.json's {KEY!r} is {entry!r}, which describes no grid. Delete the entry."
            ) from error
        fixed_point_bits = entry.get("fixed_point_bits")
        if fixed_point_bits not in (None, *range(2, 8)):
            raise ValueError(
                f"config.json's {KEY!r} has `fixed_point_bits` {fixed_point_bits!r}; allowed are 2 to 7. Delete the "
                "entry."
            )
        try:
            cache = CacheRounding(**entry["kv_cache"]) if entry.get("kv_cache") is not None else None
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"config.json's {KEY!r} has `kv_cache` {entry['kv_cache']!r}, which describes no rounding of a KV "
                f"cache ({error}). Delete it, if the cache shall be float."
            ) from error
        trainings = entry.get("trainings") or []
        if not isinstance(trainings, list) or not all(isinstance(training, dict) for training in trainings):
            raise ValueError(
                f"config.json's {KEY!r} has `trainings` {trainings!r}, which must be a list of dictionaries. Delete it."
            )
        return cls(
            grid,
            entry.get("scale_dtype"),
            entry.get("recipe"),
            others,
            fixed_point_bits,
            cache,
            entry.get("base"),
            tuple(trainings),
        )

    @classmethod
    def of(cls, config: Any) -> Record | None:
        """The record in a model's configuration, None if there is none. Raises ValueError as `read` does."""
        return cls.read(getattr(config, KEY, None))

    def put_into(self, config: Any) -> None:
        """Set the entry of a model's configuration, which `save_pretrained` writes to config.json."""
        setattr(config, KEY, self.entry())


def _fields(grid: Grid) -> dict[str, Any]:
    return {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}


def _grid(entry: Mapping[str, Any]) -> Grid:
    return Grid(entry["bits"], entry["group_size"], entry["symmetric"])
