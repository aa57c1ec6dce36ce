"""Which base an adapter was made for: an adapter is loaded on the base that it was trained on, or not at all.

Two numbers tell, each a sum over everything times a number for its position, modulo 2^64. The *fingerprint* is that of
the weights before conversion, floats or integers; it is known, and refused, before anything is changed. The *checksum*
is that of the integers that the base converted to, so it also tells two conversions of one base apart.

A position's number is a hash of it. In version 1 the numbers grew evenly, and rows [1, 2, 2, 1] and [2, 1, 1, 2] had
one sum. Files of version 1 are checked by their checksum alone: it can always be computed as they have it, and their
fingerprint only while the float weights exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...checkpoint.model_source import AnotherBase
from ...chunks import row_chunks
from ...grid import GridTensor
from ...modules.packed import QuantizedLinear

#: How the fingerprint of a base that was quantized already begins.
QUANTIZED_BASE = "int:"
#: Of the numbers for positions. Checksums of version 2 say so.
VERSION = 2
_SECOND = "v2:"


def version_of(checksum: str) -> int:
    """The version of a fingerprint or checksum."""
    return 2 if checksum.removeprefix(QUANTIZED_BASE).startswith(_SECOND) else 1


def _hash(positions: torch.Tensor) -> torch.Tensor:
    """int64, odd: SplitMix64's last steps (Steele et al., OOPSLA 2014), whose constants these are, modulo 2^64."""
    mixed = positions
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * (factor - 2**64)
    return (mixed ^ ((mixed >> 31) & ((1 << 33) - 1))) | 1


def position_weighted_sum(matrix: torch.Tensor, salt: int, version: int = VERSION) -> torch.Tensor:
    """int64 scalar, modulo 2^64: a sum of integers or fp32 bit patterns, each times a number for its position."""
    return _sum_and_finite(matrix, salt, version)[0]


def _sum_and_finite(matrix: torch.Tensor, salt: int, version: int = VERSION) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.zeros((), dtype=torch.int64, device=matrix.device)
    finite = torch.ones((), dtype=torch.bool, device=matrix.device)
    columns = torch.arange(matrix.shape[1], device=matrix.device) * 2654435761 + salt
    columns = columns if version == 1 else _hash(columns)
    for rows in row_chunks(matrix.shape[0], matrix.shape[1], matrix.device):
        part = matrix[rows]
        if part.is_floating_point():
            part = part.float().contiguous()
            finite &= torch.isfinite(part).all()
            part = part.view(torch.int32)
        row = torch.arange(rows.start, rows.stop, device=matrix.device) * 2246822519 + 1
        row = row if version == 1 else _hash(row)
        total += ((part.to(torch.int64) * columns).sum(dim=1) * row).sum()
    return total, finite


def float_checksum(weight: torch.Tensor) -> int | None:
    """A number that tells two float (out, in) weights apart, None if not all of it is finite; the weight is read once.

    It depends on values only: a bf16 weight and its copy in fp32 have the same.
    """
    total, finite = _sum_and_finite(weight.detach(), 1)
    return int(total) if finite else None


def codes_checksum(weight: GridTensor) -> int:
    """A number that tells two quantized (out, in) weights apart."""
    total = position_weighted_sum(weight.codes, 1) + position_weighted_sum(weight.scale, 2)
    return int(total if weight.zero_point is None else total + position_weighted_sum(weight.zero_point, 3))


def in_order(checksums: Iterable[int], version: int = VERSION) -> str:
    """One number, its version and 16 hexadecimal digits, for the checksums of several layers, which count by order.

    Not by their names: PEFT and transformers prefix them differently.
    """
    total = sum(
        checksum * (2 * index + 1 if version == 1 else pow(0x9E3779B97F4A7C15, index, 2**64))
        for index, checksum in enumerate(checksums)
    )
    return f"{'' if version == 1 else _SECOND}{total % 2**64:016x}"


def as_tensor(checksum: str) -> torch.Tensor:
    """int64 (2,): a checksum of `in_order` as files of tensors hold it, and its version; version 1: int64 (1,)."""
    value = int(checksum.removeprefix(_SECOND), 16)
    version = version_of(checksum)
    return torch.tensor([value - 2**64 if value >= 2**63 else value, *([version] if version > 1 else [])])


def of_tensor(saved: torch.Tensor) -> str:
    """Undo `as_tensor`.

    Raises:
        ValueError: the version is unknown, or the tensor holds floats: somebody has changed all that is in the file.
    """
    if saved.dtype != torch.int64:
        raise ValueError(
            f"The adapter's checksum of its base (`...base_checksum`) is {saved.dtype}; it must be torch.int64. "
            "Whoever casts, scales or averages the tensors of adapters leaves this one as it was. Nothing was loaded."
        )
    value, version = [*saved.flatten().tolist(), 1][:2]
    if version not in (1, VERSION):
        raise ValueError(
            f"The adapter file's checksum has version {version}; this version of peft-lrqat knows 1 and {VERSION}. "
            "Update peft-lrqat, or load the adapter with the version that wrote it. Nothing was loaded."
        )
    return in_order([value], version)


def fingerprint(targets: dict[str, nn.Module], checksums: Mapping[str, int | None]) -> str | None:
    """The fingerprint of targeted modules; that of integers starts with `QUANTIZED_BASE`.

    Args:
        checksums: of their weights, by the modules' names; None: of a base that was written to, whose weights nobody
            knows. Then there is no fingerprint, and the checksum tells.
    """
    known = [checksum for name in targets if (checksum := checksums[name]) is not None]
    if len(known) < len(targets):
        return None
    return (QUANTIZED_BASE if any(map(_holds_integers, targets.values())) else "") + in_order(known)


def _holds_integers(module: Any) -> bool:
    frozen = module.frozen if isinstance(module, BaseTunerLayer) else None  # type: ignore[attr-defined]  # ours has it
    return isinstance(module, QuantizedLinear) if frozen is None else frozen.quantized_before


def dtype_of(targets: dict[str, nn.Module]) -> str | None:
    """The dtype of most of the targeted modules; architectures keep some in fp32, whatever the others are in.

    None without modules, which PEFT refuses later.
    """
    found = Counter(_dtype(module) for module in targets.values())
    return str(found.most_common(1)[0][0]).removeprefix("torch.") if found else None


def _dtype(module: Any) -> torch.dtype:
    layer = module.frozen if isinstance(module, BaseTunerLayer) else module  # type: ignore[attr-defined]  # ours has it
    return getattr(layer, "compute_dtype", None) or layer.weight.dtype


def check_fingerprint(found: str | None, required: str | None, dtype: str | None = None) -> None:
    """Raise AnotherBase if an adapter was made for a base with another fingerprint (None: for any).

    Args:
        dtype: that of the base on which it was trained, if that is known.
    """
    if required is None or found is None or required == found:
        return
    both = [text.startswith(QUANTIZED_BASE) for text in (found, required)]
    if version_of(required) != version_of(found) and both[0] == both[1]:
        return  # the checksum tells
    wanted = "integers" if required.startswith(QUANTIZED_BASE) else "float weights"
    here = "integers" if found.startswith(QUANTIZED_BASE) else "float weights"
    how = (
        "Load it on the quantized model that it was trained on, with `peft_lrqat.load_quantized(...)`"
        if wanted == "integers"
        else "Load it on the float model, in the dtype, that it was trained on "
        f"({'' if dtype else 'e.g. '}`dtype=torch.{dtype or 'bfloat16'}`; rotated alike, `preprocess_rotation`)"
    )
    raise AnotherBase(
        f"This adapter was trained on another base model: its {wanted} had the fingerprint {required}, but the "
        f"targeted modules of this model have {here} with {found}. On other weights it means something else, so it "
        f"was not loaded. {how} (see `base_model_name_or_path` in its adapter_config.json); for a new adapter, make a "
        "new configuration, or set `base_fingerprint=None`."
    )


_BEFORE_SIGNED_SCALES = (
    "This model was converted with `signed_scales=True`, which is the default now: if the adapter, or the Trainer "
    "checkpoint that is resumed from, was made before that, set `signed_scales=False` in the configuration. Otherwise: "
)


def check_checksum(found: str, required: str | None, signed_scales: bool = False) -> None:
    """Raise ValueError if an adapter was trained over other integers than those of the base at hand (None: any).

    Args:
        signed_scales: whether the base was converted with them, which an adapter of before they were there was not.
    """
    if required is None or required == found:
        return
    raise ValueError(
        f"This adapter was trained on another base: its integers have the checksum {required}, but those of this "
        f"model have {found}. On other integers it means something else, so it was not loaded. "
        + (_BEFORE_SIGNED_SCALES if signed_scales else "")
        + "Load it on the same float model, in the same dtype and with the same options, that it was trained on (see "
        "`base_model_name_or_path` in its adapter_config.json); for a new adapter, make a new configuration, or set "
        "`base_checksum=None`."
    )
