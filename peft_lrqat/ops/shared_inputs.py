"""One rounding for all layers that share an input: q, k and v are given one tensor, gate and up another.

A layer rounds its own input and knows no other layer. So each thread keeps what it rounded last, and gives it to the
next layer that asks for the same, where nobody could tell that from rounding again:

* it is the same tensor (the object), of the same memory, and nobody has written to it since (its version), nor to what
  it was rounded to. What is written past the version (`x.data.mul_(2)`, a kernel that says nothing) is not seen;
* it is rounded by the same rule, with the same fixed scale if it has one (the parameter that it is made of), and in
  the same dtype, which autocast decides;
* it is used on the stream that it was computed on, in the CUDA graph that it was captured in;
* the layer was not given it before: one that asks twice has begun another pass, before which somebody may have written
  to a buffer in a way that has no version (a replayed graph, a message of another process).

Only numbers are shared, no autograd graph: gradients, checkpointing and hooks are each layer's own. They go when the
input does, or when the thread rounds another.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from .activations import Activations, round_activations, rounded_values, straight_through
from .dispatch import autocast_dtype
from .inputs import check_linear_input, linear_input
from .static_inputs import LearnedScale, learned_values, round_learned


class _Latest(threading.local):
    rounding: _Rounding | None = None


_latest = _Latest()


class _Scale:
    """A fixed scale that inputs were rounded with: which tensor it was made of, written to how often."""

    __slots__ = ("log2", "pointer", "scale_dtype", "version")

    def __init__(self, learned: LearnedScale) -> None:
        self.log2, self.scale_dtype = weakref.ref(learned.log2), learned.scale_dtype
        self.pointer, self.version = learned.log2.data_ptr(), learned.log2._version

    def makes(self, learned: LearnedScale) -> bool:
        log2 = learned.log2
        return (
            self.log2() is log2
            and self.version == log2._version
            and self.pointer == log2.data_ptr()
            and self.scale_dtype == learned.scale_dtype
        )


class _Rounding(weakref.ref):
    """What an input was rounded to: a reference to the input, that does not keep it."""

    __slots__ = (
        "activations",
        "dtype",
        "layers",
        "place",
        "pointer",
        "scale",
        "shape",
        "strides",
        "values",
        "version",
        "written",
    )

    values: Tensor | None
    version: int  # of the input
    written: int  # version of the values
    pointer: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    activations: Activations
    scale: _Scale | None  # the fixed one
    place: Any  # see `_place`
    layers: set[int]  # those that were given the values, by id

    def serves(
        self,
        x: Tensor,
        dtype: torch.dtype,
        activations: Activations,
        learned: LearnedScale | None,
        place: Any,
        layer: int,
    ) -> bool:
        """Whether these numbers are what rounding x would make anew."""
        values = self.values
        return (
            self() is x
            and values is not None
            and self.version == x._version
            and self.written == values._version
            and self.pointer == x.data_ptr()
            and self.shape == x.shape
            and self.strides == x.stride()
            and values.dtype == dtype
            and self.dtype == x.dtype
            and self.activations == activations
            and (learned is None if self.scale is None else learned is not None and self.scale.makes(learned))
            and self.place == place
            and layer not in self.layers
        )


def _forget(rounding: Any) -> None:
    """Called when the input is gone."""
    rounding.values = None


def _place(x: Tensor) -> Any:
    """Where and when x is computed with, as far as what was computed elsewhere may not be ready, or may not be computed
    again when x is; None: nothing is to be shared."""
    if type(x) is not Tensor or torch.is_inference_mode_enabled() or x.is_inference():
        return None  # without a version: the input, or what it would be rounded to
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return None  # somebody watches every operation, or x stands for other tensors
    if not x.is_cuda:  # asked so, because `x.device.type` takes as long as all that is asked here
        return "cpu" if x.is_cpu else None
    stream = torch._C._cuda_getCurrentRawStream(x.get_device())
    if not torch.cuda.is_current_stream_capturing():
        return stream, None
    try:
        return stream, weakref.ref(torch._C._CUDAGraph.get_currently_capturing_graph())
    except (AttributeError, RuntimeError, TypeError):  # of an older torch, or not captured by torch
        return None


def shared_values(
    x: Tensor, activations: Activations, layer: Any, learned: LearnedScale | None = None
) -> Tensor | None:
    """Check a layer's input, and compute what it is rounded to, or return what another layer was given for it.

    Args:
        x: (..., in), any float dtype, as the layer is given it.
        activations: how it is rounded.
        layer: who asks, see `linear_input`.
        learned: the fixed scale, where it is one.

    Returns:
        What `round_activations` (or `round_learned`) makes of `linear_input(x, layer)`, but without a graph, and nobody
        may write to it.
        None: call these two, because the call is being recorded (torch.compile, torch.jit.trace).
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return None
    check_linear_input(x, layer)
    place, dtype = _place(x), autocast_dtype(x)
    if place is None or (learned is not None and learned.log2.is_inference()):
        return _values(x, dtype, activations, learned)
    latest = _latest.rounding
    if latest is not None:
        values = latest.values
        if latest.serves(x, dtype, activations, learned, place, id(layer)):
            latest.layers.add(id(layer))
            return values
    _latest.rounding = None  # before there are two
    values = _values(x, dtype, activations, learned)
    rounding = _Rounding(x, _forget)
    rounding.values, rounding.written, rounding.layers = values, values._version, {id(layer)}
    rounding.version, rounding.pointer = x._version, x.data_ptr()
    rounding.shape, rounding.strides, rounding.dtype = x.shape, x.stride(), x.dtype
    rounding.activations, rounding.place = activations, place
    rounding.scale = None if learned is None else _Scale(learned)
    _latest.rounding = rounding
    return values


def _values(x: Tensor, dtype: torch.dtype, activations: Activations, learned: LearnedScale | None) -> Tensor:
    x = x.detach().to(dtype)
    return rounded_values(x, activations) if learned is None else learned_values(x, learned)


def round_shared(x: Tensor, activations: Activations, layer: Any) -> Tensor:
    """Round a layer's input, once for all layers that share it, with a straight-through gradient.

    Args:
        x, layer: as in `shared_values`.
        activations: dynamic.
    """
    values = shared_values(x, activations, layer)
    if values is None:
        return round_activations(linear_input(x, layer), activations)
    return straight_through(x, values)


def through_rounding(x: Tensor, values: Tensor, learned: LearnedScale | None) -> Tensor:
    """Return what `shared_values` computed, with the gradient of the rounding.

    Args:
        x, learned: as in `shared_values`.
        values: what it returned.
    """
    if learned is None:
        return straight_through(x, values)
    recorded = torch.is_grad_enabled() and (x.requires_grad or learned.log2.requires_grad)
    return round_learned(x.to(values.dtype), learned) if recorded else values
