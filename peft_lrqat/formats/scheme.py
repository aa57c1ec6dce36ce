"""How a checkpoint stores one linear layer, and the checks of what was read.

A `Scheme` is what config.json says of a layer. The small tensors (scales and zero points) are read and checked first,
for every layer, so that a damaged checkpoint is refused before anything is built or written; the codes come last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import regex
import torch

from ..grid import PER_CHANNEL, PER_TENSOR, Grid, GridTensor
from ..ops.activations import Activations

#: What a file holds for a layer: last part of the tensor's name -> tensor.
Tensors = Mapping[str, torch.Tensor]

#: The dtypes that scales may have.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint stores one linear layer.

    Attributes:
        method: the format, as in `quant_method` of config.json.
        bits: width of the stored codes.
        group_size: as in `Grid`.
        symmetric: what the checkpoint says; the zero points that it stores have the last word.
        variant: what else the method tells apart: GPTQ's version, how compressed-tensors packed codes of odd width.
        activations: how inputs are rounded, or None.
        code_grid: the bits of the grid, where it is not that of `bits`: 1.58 for ternary codes in two bits.
    """

    method: str
    bits: int
    group_size: int
    symmetric: bool
    variant: str = ""
    activations: Activations | None = None
    code_grid: float | None = None

    def grid(self, symmetric: bool, in_features: int, scales_a_row: int | None) -> Grid:
        """The grid of the container: the widest that the codes can use.

        Args:
            symmetric: what the zero points say.
            scales_a_row: how many there are in fact; one makes the grid per channel, unless that is a whole group.
        """
        group_size = self.group_size
        if scales_a_row == 1 and group_size not in (PER_TENSOR, in_features):
            group_size = PER_CHANNEL
        bits = self.bits if self.code_grid is None else self.code_grid
        return Grid(bits, group_size, symmetric)  # type: ignore[arg-type] # 1.58


def int32(packed: torch.Tensor, name: str) -> torch.Tensor:
    """Return `packed`; raise RuntimeError if it is not int32: packed codes of another dtype are something else."""
    if packed.dtype != torch.int32:
        raise RuntimeError(f"`{name}` is {packed.dtype}, not int32")
    return packed


#: Name of a module in the file, and, if it is another, in the model -> how its weight is stored. Raises ValueError for
#: a module that config.json says nothing of.
Describe = Callable[..., Scheme]


@dataclass(frozen=True)
class Scales:
    """The small tensors of a layer, checked.

    Attributes:
        scale: fp32 (rows, groups) of `grid`, weight units per grid step, finite; negative where the
            side with one level more lies above zero (`signed_scales`).
        zero_point: int8 (rows, groups) in grid steps, None if the grid is symmetric.
        grid: of the container, or the narrower one that was recorded.
        dtype: of the scales in the file.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    grid: Grid
    dtype: torch.dtype


def check_scales(
    scheme: Scheme,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    out_features: int,
    in_features: int,
    where: str,
) -> Scales:
    """Scales and zero points on the grid of the container.

    Args:
        scale, zero_point: as the file has them, (rows, groups); the zero point centred.
        where: the layer's name, for messages.

    Raises:
        ValueError: a shape or a dtype is not what the scheme needs; a scale is infinite or NaN; a zero point lies
            outside of the grid, or beside rounded activations.
    """
    dtype = scale.dtype
    if dtype not in _FLOATS:
        raise ValueError(
            f"Layer {where!r} has scales of dtype {dtype}; float32, bfloat16 and float16 can be read. The checkpoint "
            "is damaged, or of another format than its config.json says."
        )
    if zero_point is not None and (zero_point.is_floating_point() or zero_point.dtype == torch.bool):
        raise ValueError(
            f"Layer {where!r} has zero points of dtype {zero_point.dtype}; integers can be read. The checkpoint is "
            "damaged, or of another format than its config.json says."
        )
    symmetric = scheme.symmetric and (zero_point is None or not bool(zero_point.any()))
    grid = scheme.grid(symmetric, in_features, scale.shape[1] if scale.dim() == 2 else None)
    grid.check_divides(in_features, f"layer {where!r}")
    wanted = grid.scale_shape(out_features, in_features)
    if tuple(scale.shape) != wanted:
        raise ValueError(f"Layer {where!r} has scales of shape {tuple(scale.shape)}; {grid.describe()} needs {wanted}.")
    if zero_point is not None and tuple(zero_point.shape) != wanted:
        raise ValueError(
            f"Layer {where!r} has zero points of shape {tuple(zero_point.shape)}; {grid.describe()} needs {wanted}."
        )
    if zero_point is not None:
        _check_on_grid(zero_point, grid, f"Layer {where!r} has zero points")
        zero_point = zero_point.to(torch.int8)
    if scheme.activations is not None and not symmetric:
        raise ValueError(
            f"Layer {where!r} has zero points beside rounded activations, which transformers does not run: it "
            "decompresses such a model while loading, and then rounds no activations. Start from a symmetric "
            "checkpoint, or from the float model."
        )
    scale = scale.float()
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(
            f"Layer {where!r} has scales that are infinite or NaN: the checkpoint is damaged. Download it again, or "
            "quantize the model again."
        )
    if bool((scale == 0).all()):
        raise ValueError(f"Layer {where!r} has only scales of zero: the checkpoint is damaged. Download it again.")
    if symmetric:
        zero_point = None
    elif zero_point is None:
        zero_point = torch.zeros(wanted, dtype=torch.int8, device=scale.device)
    return Scales(scale.contiguous(), zero_point, grid, dtype)


def _check_on_grid(values: torch.Tensor, grid: Grid, what: str) -> None:
    low, high = int(values.min()), int(values.max())
    if low < grid.qmin or high > grid.qmax:
        raise ValueError(
            f"{what} from {low} to {high}, outside of the grid that config.json records ({grid.describe()}: "
            f"{grid.qmin} to {grid.qmax}): the checkpoint is damaged or was edited."
        )


def check_order(index: torch.Tensor, in_features: int, per_scale: int, where: str, name: str) -> None:
    """Raise ValueError unless inputs belong to scales in their own order.

    Args:
        index: int (in,), the group of each input; all -1 where there is no order, as compressed-tensors writes it.
        per_scale: inputs that share a scale.
        name: of the tensor.
    """
    if index.is_floating_point() or index.dim() != 1 or index.numel() != in_features:
        raise ValueError(
            f"Layer {where!r} has `{name}` of {index.dtype} {tuple(index.shape)}; an integer for each of {in_features} "
            "inputs is needed. The checkpoint is damaged: download it again."
        )
    if bool((index < 0).all()):
        return
    plain = torch.arange(index.numel(), device=index.device) // per_scale
    if not torch.equal(index.to(plain.dtype), plain):
        raise ValueError(
            f'Layer {where!r} assigns inputs to scales by activation order (`{name}`; "desc_act": true in GPTQ, '
            '"actorder": "group" in compressed-tensors). A grid with groups needs neighbouring inputs to share a '
            "scale: quantize again with static groups or without activation order."
        )


def narrow(scales: Scales, recorded: Grid, out_features: int, in_features: int, where: str) -> Scales:
    """The same scales on the grid that config.json records, where the file is wider: in bits, or by repeating them.

    Raises:
        ValueError: the recorded grid is not that of the file.
    """
    rows, groups = recorded.scale_shape(out_features, in_features) if _divides(recorded, in_features) else (0, 0)
    zero_point = scales.zero_point
    if zero_point is None and not recorded.symmetric:  # all of them are zero
        zero_point = torch.zeros_like(scales.scale, dtype=torch.int8)
    fits = recorded.symmetric == (zero_point is None) and recorded.code_bits <= scales.grid.code_bits
    if not groups or scales.scale.shape[1] % groups or rows > scales.scale.shape[0] or not fits:
        raise ValueError(
            f"{where}: config.json records the grid {recorded.describe()}, but the file holds {scales.grid.describe()}:"
            " the checkpoint was edited. Delete the entry 'peft_lrqat' of config.json to read the file's own grid."
        )

    def shared(stored: torch.Tensor) -> torch.Tensor:
        per_row = stored.view(stored.shape[0], groups, -1)
        first = per_row[:rows, :, :1]
        if not torch.equal(first.expand_as(per_row), per_row):
            raise ValueError(
                f"{where}: scales differ within what config.json records as {recorded.describe()}: the checkpoint is "
                "damaged or was edited. Delete the entry 'peft_lrqat' of config.json to read the file's own grid."
            )
        return first[..., 0].contiguous()

    if zero_point is not None:
        _check_on_grid(zero_point, recorded, f"{where} has zero points")
        zero_point = shared(zero_point)
    return Scales(shared(scales.scale), zero_point, recorded, scales.dtype)


def check_input_scale(scheme: Scheme, tensors: Tensors, where: str) -> torch.Tensor | None:
    """The fixed scale of a layer's input, fp32 (1,), if it has one.

    Raises:
        ValueError: it is missing or not expected, or it is not one positive number.
    """
    fixed, name = scheme.activations is not None and scheme.activations.static, "input_scale"
    if fixed != (name in tensors):
        raise ValueError(
            f"Layer {where!r} has {'no' if fixed else 'an'} `{name}`, but config.json says that its input is "
            f"{'rounded with a fixed scale' if fixed else 'not rounded with a fixed scale'}: the checkpoint is damaged."
        )
    if not fixed:
        return None
    scale = tensors[name]
    if scale.numel() != 1 or not scale.is_floating_point() or not bool(torch.isfinite(scale) & (scale > 0)):
        raise ValueError(f"Layer {where!r} has an `{name}` that is not one positive number: the checkpoint is damaged.")
    return scale.detach().float().view(1)


def _divides(grid: Grid, in_features: int) -> bool:
    return grid.group_size <= 0 or in_features % grid.group_size == 0


def check_codes(scales: Scales, codes: torch.Tensor, where: str) -> GridTensor:
    """Codes on the grid of their scales.

    A group of zeros may have a scale of zero, which no grid has: any scale stands for the same weights, so it gets
    2^-24.

    Args:
        codes: int8 (out, in), centred.

    Raises:
        ValueError: a code lies outside of the grid; a scale is zero although its codes are not.
    """
    grid, scale, zero_point = scales.grid, scales.scale, scales.zero_point
    _check_on_grid(codes, grid, f"{where} holds codes")
    if bool((scale == 0).any()):
        per_group = codes.view(codes.shape[0], scale.shape[1], -1)
        levels = per_group if zero_point is None else per_group - zero_point.unsqueeze(-1)
        if bool((levels.any(dim=-1) & (scale == 0)).any()):
            raise ValueError(
                f"Layer {where!r} has scales of zero whose codes are not zero: the checkpoint is damaged. Download it "
                "again, or quantize the model again."
            )
        scale = torch.where(scale == 0, 2.0**-24, scale)
    return GridTensor(codes, scale, zero_point, grid)


def pattern_matches(pattern: str, name: str) -> bool:
    """`re.match` of a regular expression that a file brings, which may be written so that it never ends.

    Raises:
        ValueError: it is not a regular expression, or takes longer than a second.
    """
    try:
        return regex.match(pattern, name, timeout=1.0) is not None
    except TimeoutError:
        raise ValueError(f"The pattern {pattern[:80]!r} in config.json takes for ever: the file is damaged.") from None
    except regex.error as error:
        raise ValueError(f"The pattern {pattern[:80]!r} in config.json is none: {error}.") from error
