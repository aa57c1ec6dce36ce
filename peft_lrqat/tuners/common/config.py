"""What the configurations of both methods share: a grid, and checks of the adapter's file before it is loaded."""

from __future__ import annotations

import json
import os
from typing import Any, ClassVar, cast

from peft import PeftType
from peft.config import PeftConfigMixin
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ...checkpoint.card import add_import_note
from ...formats.record import Record
from ...grid import Grid

#: How the fingerprint of a base that was quantized already begins.
QUANTIZED_BASE = "int:"


class GridConfig(PeftConfigMixin):
    """What the configurations of this package share: a grid, and checks of the adapter's file before it is loaded.

    Attributes:
        method: the method's name, for messages.
        quantizes: the classes of modules that can be adapted.
        takes_quantized: whether training may start from a base that is quantized already.
    """

    method: ClassVar[str]
    quantizes: ClassVar[tuple[type, ...]]
    takes_quantized: ClassVar[bool] = False
    bits: int
    group_size: int
    container_bits: int | None
    scale_dtype: str
    base_model_name_or_path: str | None
    export_format: str | None = "compressed-tensors"
    act_bits: int | None = None

    @property
    def grid(self) -> Grid:
        """The grid that the fields describe."""
        raise NotImplementedError

    @property
    def stored_grid(self) -> Grid:
        """The grid of the merged checkpoint."""
        return self.grid

    @property
    def stored_bits(self) -> int:
        """Width of the codes in the merged checkpoint."""
        return self.container_bits or self.stored_grid.code_bits

    @property
    def activations(self) -> str | None:
        """The rule by which inputs are rounded to 8 bits, the checkpoint format's (`ops.activations`), or None."""
        return None if self.act_bits is None else self.export_format

    def record(self) -> Record:
        """What a merged checkpoint's config.json says about the training."""
        return Record(self.stored_grid, self.scale_dtype, self.recipe())

    def recipe(self) -> str:
        """What a merged checkpoint's model card says about the training."""
        raise NotImplementedError

    def check_int8_activations(self) -> None:
        """With `act_bits=8`: int8 matrix products. Sets the container; raises ValueError for what they cannot take."""
        if self.act_bits not in (None, 8):
            raise ValueError(f"`act_bits` is {self.act_bits!r}; allowed are None and 8.")
        if self.act_bits is None or self.export_format == "bitnet":
            return
        if self.group_size > 0:
            raise ValueError(
                f"`act_bits` is 8 with `group_size={self.group_size}`, but int8 matrix products take one scale per "
                "output channel (-1) or tensor (0)."
            )
        if not self.grid.symmetric:
            raise ValueError("`act_bits` is 8 with `symmetric=False`, but int8 matrix products have no zero points.")
        if self.container_bits not in (None, 8):
            raise ValueError(
                f"`container_bits` is {self.container_bits} with `act_bits=8`, but engines multiply int8 activations "
                "with int8 weights. Use 8 or None."
            )
        self.container_bits = 8

    def expected_shapes(self, out_features: int, in_features: int) -> dict[str, tuple]:
        """Tensor name -> shape (None: any) of what an adapter's file holds for a layer."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """PEFT's `from_pretrained`; a local adapter file is checked here, before any model is touched.

        Raises:
            ValueError: the adapter's weight file is truncated or not a safetensors file.
        """
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        shapes = _adapter_shapes(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, GridConfig):
            config._adapter_shapes = shapes
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's `save_pretrained`; the model card gets the import line without which PEFT cannot load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        add_import_note(save_directory, self.method, PeftType(self.peft_type).value, self.grid.describe())

    # What the adapter's file holds (name -> shape), if this config was loaded from a folder; not saved.
    _adapter_shapes = cast("dict[str, tuple[int, ...]] | None", None)  # without an annotation: it is no field


def check_choice(name: str, value: Any, allowed: tuple) -> None:
    """Raise ValueError unless `value`, of the option `name`, is among `allowed`."""
    if value not in allowed:
        raise ValueError(f"`{name}` is {value!r}; allowed are {', '.join(repr(a) for a in allowed if a is not None)}.")


def _adapter_shapes(path: str) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes in a local adapter file (its header is read, not its data); None if there is no such file."""
    if not os.path.isfile(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"The adapter file {path!r} is truncated or damaged ({error}). Nothing was loaded; copy or download it "
            "again."
        ) from error
