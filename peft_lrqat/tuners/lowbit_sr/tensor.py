"""The trainable weight that has no float copy.

Low-bit SR (DQT, "Direct Quantized Training of Language Models with Stochastic Rounding", arXiv 2412.04787) trains the
integers themselves. The forward uses W^ = s q; the gradient G = dL/dW^ is taken there, without any straight-through
estimator; and one optimizer step is

    w   = s q                                          in fp32, for the parameter or the row chunk at hand
    w'  = optimizer(w, G)                              any rule: AdamW, SGD, Adafactor, Muon ...
    q'  = clip(q + floor((w' - w) / s + u))            u uniform in (0, 1): up with probability equal to the fraction

E[q'] = (w' / s) wherever nothing is clipped: an update of a hundredth of a grid step moves one weight in a hundred by
a whole step. Rounding happens once per step, not once per term, and no update, no change.

What can be the `nn.Parameter` then? Autograd wants a leaf of a floating dtype, PEFT and Trainer find what to train by
`requires_grad`, and torch's optimizers write to parameters in place. `LowBitTensor` is a wrapper subclass: outside an
fp32 tensor of shape (out, in) without storage, inside packed codes, scales and the position in the random stream.
Gradients arrive as plain dense tensors. Reading it in any operation gives a plain tensor s q. Writing to it in place is
refused, because an in-place update would be rounded once per term at best, and at worst (a fused kernel on a
dequantized copy) would be lost without a word. Optimizers get their chance in `any_optimizer.py`: for the time of their
`step()` they see plain float parameters, which are rounded into the codes afterwards. `LowBitAdamW` (`optim.py`) works
on the packed codes and needs no float copy at all.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ...chunks import row_chunks
from ...grid import Grid, grouped, rows_of
from ...ops.latent import UNKNOWN
from ...packing import pack, unpack, words_per_row
from ...read_only import arguments_written, views_of
from ...rounding import poison, random_words, round_stochastically, uniform
from ..common.parallel import DEEPSPEED, FSDP1, FSDP2, Mark
from .any_optimizer import install_hooks

_aten = torch.ops.aten

_BETWEEN = (
    "Values that lie between the levels of a low-bit weight, or beyond them, were copied to it. Each goes to the "
    "nearest level: moves of less than half a step are lost. Steps belong to an optimizer, which rounds them "
    "stochastically; an average of weights (AveragedModel, an EMA) belongs in float tensors, which the weight's "
    "`to_float()` gives."
)

_REMEDY = (
    "Update it with a `torch.optim.Optimizer` (its `step()` is intercepted), or with `peft_lrqat.LowBitAdamW`, which "
    "needs no float copy. To set values, use `copy_` on the whole weight, which rounds to nearest."
)
_COLLECTIVE = (
    "Collectives take its `packed`, `scale` and `stream`, one by one. ZeroRedundancyOptimizer sends weights and cannot "
    "share low-bit ones out: use the optimizer without it (LowBitAdamW's state takes 2 bytes a weight)."
)
_VIEW_ERROR = f"This is a view of a low-bit weight: its values are built from packed integers, for reading. {_REMEDY}"


class LowBitTensor(torch.Tensor):
    """Packed codes that look like an fp32 weight of shape (out, in).

    Attributes:
        packed: int32 (out, ceil(in * code_bits / 32)), see `packing.py`.
        scale: fp32 (rows, groups), weight units per grid step; never trained here (a learned scale is a factor beside
            it, see `layer.py`).
        stream: int64 (2,), the key of the random stream and how often this weight has been rounded, see `rounding.py`.
        grid: the `Grid`.
        error_feedback: whether the optimizer is to keep the rounding remainder; None: if it can.
        fine_tunes: whether the weight was pretrained (`learning_rate.py`).
        grows: whether optimizers double scales whose codes come to lie at the ends of the grid (`growth.py`).
        places: int8 (out, in), where between the levels the float weights lay, or UNKNOWN (`ops/latent.py`), until the
            first step of an optimizer; None: nobody knows. Whoever writes other codes or scales makes it UNKNOWN.
        known_count: how often the weight had been rounded when `growth.py` looked last, and the version of `stream`
            then; None before that.
        taken_at_once: whether an optimizer takes each gradient when it arrives (`fused_backward`), so that it need not
            be cast to fp32.
        gradient_places: to which a gradient is written that is taken at once; None: to new memory. Of the stand-ins of
            `modules/block_recording.py`.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    stream: torch.Tensor
    grid: Grid
    error_feedback: bool | None
    fine_tunes: bool
    grows: bool
    places: torch.Tensor | None
    known_count: tuple[int, int] | None
    taken_at_once: bool
    gradient_places: list[torch.Tensor] | None = None

    #: What a forward reads of it: with other ones, a recorded forward would be another (`modules/block_state.py`).
    read_in_forward = ("packed", "scale", "grid", "taken_at_once")

    _fsdp_flattened = Mark(FSDP1, asking=True)  # torch.distributed.fsdp._common_utils.FSDP_FLATTENED
    ds_status = Mark(DEEPSPEED, asking=True)  # DeepSpeed's engine asks every parameter, in every stage

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's docs do it

    @staticmethod
    def __new__(
        cls,
        packed: torch.Tensor,
        scale: torch.Tensor,
        stream: torch.Tensor,
        grid: Grid,
        in_features: int,
        error_feedback: bool | None = None,
        fine_tunes: bool = False,
        grows: bool = False,
    ) -> LowBitTensor:
        """
        Raises:
            ValueError: the codes do not have the words that `in_features` takes.
        """
        if packed.shape[1] != words_per_row(in_features, grid.code_bits):
            raise ValueError(
                f"`packed` has {packed.shape[1]} words a row, but {in_features} codes of {grid.code_bits} bits take "
                f"{words_per_row(in_features, grid.code_bits)}."
            )
        install_hooks()
        shape = (packed.shape[0], in_features)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=packed.device)
        self.packed, self.scale, self.stream = packed, scale, stream
        self.grid, self.error_feedback, self.fine_tunes, self.grows = grid, error_feedback, fine_tunes, grows
        self.places, self.known_count, self.taken_at_once = None, None, False
        return self

    def __init__(self, *args: Any) -> None:
        pass

    @classmethod
    def from_codes(cls, codes: torch.Tensor, scale: torch.Tensor, grid: Grid, key: int) -> LowBitTensor:
        """From int8 (out, in) codes and fp32 (rows, groups) scales; `key`: of the random stream (`stream_key`)."""
        stream = torch.tensor([key, 0], device=codes.device)
        return cls(pack(codes, grid.code_bits), scale, stream, grid, codes.shape[1])

    # -- reading

    def codes(self) -> torch.Tensor:
        """int8 (out, in)."""
        return unpack(self.packed, self.grid.code_bits, self.shape[1])

    def to_float(self) -> torch.Tensor:
        """s q: a plain fp32 (out, in) tensor, built anew."""
        out = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        for rows in row_chunks(self.shape[0], self.shape[1], self.device):
            codes = unpack(self.packed[rows], self.grid.code_bits, self.shape[1]).float()
            out[rows] = (grouped(codes, self.scale) * rows_of(self.scale, rows).unsqueeze(-1)).view_as(codes)
        return out

    # -- writing

    @torch.no_grad()
    def round_from(self, target: torch.Tensor) -> None:
        """q = clip(q + floor((target - s q) / s + u)): one optimizer step (DQT, arXiv 2412.04787, eq. 5).

        Args:
            target: fp32 (out, in), weight units. Where it equals s q, the code stays. NaN and infinity make `scale`
                NaN.
        """
        key, step = self.stream[0], self.stream[1]
        for rows in row_chunks(self.shape[0], self.shape[1], self.device):
            codes = unpack(self.packed[rows], self.grid.code_bits, self.shape[1])
            scale = rows_of(self.scale, rows)
            here = grouped(codes.float(), scale) * scale.unsqueeze(-1)
            move = ((grouped(target[rows].float(), scale) - here) / scale.unsqueeze(-1)).view_as(codes)
            number = torch.arange(rows.start, rows.stop, device=self.device)
            u = uniform(random_words(number, self.shape[1], step, key))
            rounded = round_stochastically(codes, move, u, self.grid)
            self.packed[rows] = pack(rounded.to(torch.int8), self.grid.code_bits)
            poison(scale, move)
        self.stream[1].add_(1)
        self.forget_places()

    @torch.no_grad()
    def forget_places(self) -> None:
        """Make `places` None, and UNKNOWN for whoever shares them: the weight is changing."""
        if self.places is not None:
            self.places.fill_(UNKNOWN)
            self.places = None

    @torch.no_grad()
    def write(self, name: str, value: torch.Tensor) -> None:
        """Set one of `packed`, `scale` and `stream`."""
        tensor = getattr(self, name)
        if self.places is not None and name != "stream":
            self._places_hold_if((tensor == value.to(tensor.device)).all())
        tensor.copy_(value)

    def _places_hold_if(self, same: torch.Tensor) -> None:
        """Forget `places` where a bool scalar is False, which nobody waits for."""
        if self.places is not None:
            self.places.masked_fill_(~same, UNKNOWN)

    @torch.no_grad()
    def _copy(self, source: torch.Tensor) -> None:
        if isinstance(source, LowBitTensor):
            if (source.shape, source.grid) != (self.shape, self.grid):
                raise ValueError(
                    f"Codes on the grid ({source.grid.describe()}) with shape {tuple(source.shape)} cannot be copied "
                    f"to ({self.grid.describe()}), {tuple(self.shape)}: adapt the model with the configuration that "
                    "they were trained with."
                )
            for name in ("packed", "scale", "stream"):
                self.write(name, getattr(source, name))
            return
        same = torch.ones((), dtype=torch.bool, device=self.device)
        between, narrow = torch.zeros_like(same), source.dtype in (torch.bfloat16, torch.float16)
        precision = 4 * torch.finfo(source.dtype if narrow else torch.float32).eps  # of s q, and of its quotient by s
        for rows in row_chunks(self.shape[0], self.shape[1], self.device):
            scale = rows_of(self.scale, rows)
            values = source[rows].to(self.device, torch.float32).contiguous()
            places = grouped(values, scale) / scale.unsqueeze(-1)
            levels = places.round().clamp_(self.grid.qmin, self.grid.qmax)
            between |= ((places - levels).abs() > precision * levels.abs()).any()
            codes = levels.to(torch.int8).view_as(values)
            packed = pack(codes, self.grid.code_bits)
            same &= (packed == self.packed[rows]).all()
            self.packed[rows] = packed
        self._places_hold_if(same)  # data-parallel processes copy every weight to itself
        if not between.is_meta and between:
            warnings.warn(_BETWEEN, stacklevel=3)

    # What torch would do without dispatching it, to memory that is not there.

    @property
    def data(self) -> torch.Tensor:
        """The same codes, without gradient."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _refuse("data =")

    def apply_(self, *args: Any) -> NoReturn:
        _refuse("apply_")

    def map_(self, *args: Any) -> NoReturn:
        _refuse("map_")

    def share_memory_(self) -> LowBitTensor:
        """Move the codes, and what belongs to them, to shared memory."""
        for tensor in (self.packed, self.scale, self.stream, *([] if self.places is None else [self.places])):
            tensor.share_memory_()
        return self

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.to_float().__dlpack__(**kwargs)

    # -- what makes it a tensor

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> LowBitTensor:
        inner = (change(tensor) for tensor in (self.packed, self.scale, self.stream))
        changed = LowBitTensor(*inner, *self._meta)
        changed.places = None if self.places is None else change(self.places)
        return changed

    @property
    def _meta(self) -> tuple[Grid, int, bool | None, bool, bool]:
        return self.grid, self.shape[1], self.error_feedback, self.fine_tunes, self.grows

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Grid, int, bool | None, bool, bool]]:
        return ["packed", "scale", "stream"], self._meta

    @staticmethod
    def __tensor_unflatten__(
        inner: dict, meta: tuple[Grid, int, bool | None, bool, bool], size: Any, stride: Any
    ) -> LowBitTensor:
        return LowBitTensor(inner["packed"], inner["scale"], inner["stream"], *meta)

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        if id(self) in memo:
            return memo[id(self)]
        with torch.no_grad():
            copied: Any = self._with(torch.clone)
            if isinstance(self, nn.Parameter):
                copied = nn.Parameter(copied, self.requires_grad)
            else:
                copied.requires_grad_(self.requires_grad)
            if self.grad is not None:
                copied.grad = copy.deepcopy(self.grad, memo)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple:
        inner = (self.packed, self.scale, self.stream, *self._meta)
        return _rebuild, (inner, isinstance(self, nn.Parameter), self.requires_grad, self.places)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]  # torch's has a keyword
        return f"LowBitTensor({tuple(self.shape)}, {self.grid.describe()}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]  # stub lacks cls
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default):
            return args[0]._with(lambda inner: inner)
        if func is _aten.clone.default:
            return args[0]._with(torch.clone)
        if func is _aten._to_copy.default and (kwargs.get("dtype") or torch.float32).is_floating_point:
            # a device, or none; the float dtype of something without floats is always fp32, so that gradients and
            # optimizer states are
            device = kwargs.get("device")
            return args[0]._with(lambda inner: inner.to(device, copy=True))
        if func is _aten.copy_.default and isinstance(args[0], LowBitTensor):
            args[0]._copy(args[1])
            return args[0]
        if func is _aten.split.Tensor:  # what `fully_shard` does first
            raise ValueError(FSDP2)
        if any(isinstance(tensor, LowBitTensor) for tensor in arguments_written(func, args, kwargs)):
            _refuse(func._schema.name.split("::")[-1], _COLLECTIVE if func.namespace == "c10d" else _REMEDY)
        args, kwargs = tree_map_only(LowBitTensor, LowBitTensor.to_float, (args, kwargs))
        return views_of(func, func(*args, **kwargs), _VIEW_ERROR)


def _refuse(name: str, remedy: str = _REMEDY) -> NoReturn:
    raise RuntimeError(
        f"`{name}` would write to a low-bit weight in place, where it would be rounded once per operation, or be lost. "
        + remedy
    )


def _rebuild(inner: tuple, parameter: bool, requires_grad: bool, places: torch.Tensor | None = None) -> torch.Tensor:
    tensor = LowBitTensor(*inner)
    tensor.places = places
    return nn.Parameter(tensor, requires_grad) if parameter else tensor.requires_grad_(requires_grad)
