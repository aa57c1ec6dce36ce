"""Trained blocks in a folder, so that a run that was interrupted goes on where it was.

    settings.json             what the results depend on: grid, options, checksums of the weights and of the text
    block-0007.safetensors    `<layer>.numbers`, `.scale`, `.zero_point` of every layer of a block (`FixedPoint`)

Files appear whole or not at all. The hidden states are not kept: going once through the trained blocks gives them.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import read_json, write_atomically
from ..grid import Grid
from .block_weight import FixedPoint


class BlockResults:
    """The trained blocks of one run."""

    def __init__(self, folder: str | os.PathLike, settings: dict[str, Any], grid: Grid) -> None:
        """
        Args:
            folder: is made if it does not exist.
            settings: what the results depend on, JSON values.
            grid: that the blocks are trained for.

        Raises:
            ValueError: the folder holds blocks that were trained with other settings.
        """
        self.folder, self.grid = Path(folder), grid
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.json"
        if not path.exists():
            write_atomically(path, json.dumps(settings, indent=2))
            return
        found = read_json(path)
        other = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
        if other:
            listed = "; ".join(f"{key}: {found.get(key)!r} there, {settings.get(key)!r} here" for key in other)
            raise ValueError(
                f"`resume_from` is {str(folder)!r}, which holds blocks of another run ({listed}). Use the same "
                "settings, model and text, or another folder."
            )

    def read(self, index: int, device: torch.device) -> dict[str, FixedPoint] | None:
        """The weights of a block by their layers' names in it; None: it is not trained yet.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._path(index)
        if not path.exists():
            return None
        try:
            tensors = load_file(path, device=str(device))
        except SafetensorError as error:
            raise ValueError(
                f"{str(path)!r} is damaged ({error}). Delete it, and the block is trained again."
            ) from error
        layers = sorted(name.removesuffix(".numbers") for name in tensors if name.endswith(".numbers"))
        return {
            layer: FixedPoint(
                tensors[f"{layer}.numbers"], tensors[f"{layer}.scale"], tensors.get(f"{layer}.zero_point"), self.grid
            )
            for layer in layers
        }

    def write(self, index: int, trained: dict[str, FixedPoint]) -> None:
        """Keep the weights of a block."""
        tensors = {
            f"{layer}.{part}": tensor.contiguous()
            for layer, weight in trained.items()
            for part, tensor in weight._asdict().items()
            if isinstance(tensor, torch.Tensor)
        }
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".writing-") as scratch:
            made = Path(scratch) / "block"
            save_file(tensors, made)
            os.replace(made, self._path(index))

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"
