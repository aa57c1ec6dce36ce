"""A weight's gradient in the dtype in which a product has made it, where autograd wants fp32.

Products of a bf16 model make gradients in bf16. To cast each to the dtype of its fp32 parameter, and to read it so,
takes longer on a GPU than the product did. An optimizer that takes the gradient as soon as it is there can read it as
it is: every bf16 number is one of fp32, so that nothing else is computed. For autograd, and for everybody else, it is
an fp32 tensor: whoever reads or changes it finds one, and sums (of a weight that is used twice, of several backward
passes) are fp32's.

It may lie in memory that is written to again soon (`Lender`), where it would be copied otherwise for nothing.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class _Held:
    """The values of a gradient, which a detached one has in common with it.

    Attributes:
        values: a plain tensor.
        lent: whether they lie in a lender's memory.
        stream: of a GPU, on which they were made; None on a CPU.
    """

    __slots__ = ("__weakref__", "lent", "stream", "values")

    def __init__(self, values: torch.Tensor, lent: bool = False) -> None:
        self.values, self.lent = values, lent
        self.stream = _stream_of(values)

    def here(self) -> torch.Tensor:
        """The values, for whatever is asked of the current stream."""
        if self.stream is not None and (now := torch.cuda.current_stream(self.values.device)) != self.stream:
            now.wait_stream(self.stream)
            if self.lent:
                # the other stream would write there again without waiting for what is asked of this one
                self.values, self.lent = self.values.clone(), False
                self.stream.wait_stream(now)
                self.stream = now
            else:
                # autograd says so of gradients that it hands to another stream, but sees no memory in this one: it
                # would be somebody else's as soon as the gradient is dropped, while this stream still reads it
                self.values.record_stream(now)
        return self.values

    def keep(self) -> None:
        """Copy what is lent."""
        if self.lent:
            self.values, self.lent = self.values.clone(), False
            self.stream = _stream_of(self.values)


def _stream_of(values: torch.Tensor) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(values.device) if values.is_cuda else None


class Lender:
    """Memory that gradients are handed out of without a copy, although it is written to again.

    An optimizer that takes a gradient when it arrives has read it by then. Whoever still has it (a sum waits for the
    gradients of other uses of a weight; hooks keep what they like) gets a copy just before: of `take_back`.
    """

    def __init__(self) -> None:
        self._lent: list[weakref.ref[_Held]] = []

    def lend(self, values: torch.Tensor) -> NarrowGradient:
        """Return a gradient that lies where `values` do, of any float dtype."""
        held = _Held(values, lent=True)
        self._lent.append(weakref.ref(held))
        return NarrowGradient._of(held)

    def take_back(self) -> None:
        """Copy what is lent and still somebody's. To be called before anything is written to the memory."""
        for reference in self._lent:
            if (held := reference()) is not None:
                held.keep()
        self._lent.clear()


class NarrowGradient(torch.Tensor):
    """An fp32 gradient whose values are held in a narrower dtype, until somebody looks at it."""

    _held: _Held

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's docs do it

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> NarrowGradient:
        return cls._of(_Held(values))

    def __init__(self, *args: Any) -> None:
        pass

    @classmethod
    def _of(cls, held: _Held) -> NarrowGradient:
        values = held.values
        self = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32, device=values.device)
        self._held = held
        return self

    @property
    def held(self) -> torch.Tensor:
        """The gradient as it is held: a plain tensor, narrow or already fp32, which nobody may write to.

        To be read at once: where it was lent, its memory is written to again.
        """
        return self._held.here()

    def wide(self) -> torch.Tensor:
        """Return the gradient as a plain fp32 tensor, as it is held from then on."""
        held = self._held
        values = held.here()
        if values.dtype != torch.float32 or held.lent:
            held.values, held.lent = values.to(torch.float32, copy=True), False
            held.stream = _stream_of(values)
        return held.values

    # what torch does without dispatching it

    def numpy(self, **kwargs: Any) -> Any:
        return self.wide().numpy(**kwargs)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wide().__array__(*args, **kwargs)

    def tolist(self) -> Any:
        return self.wide().tolist()

    def data_ptr(self) -> int:
        return self.wide().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.wide().untyped_storage()

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        return copy.deepcopy(self.wide(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.wide().__reduce_ex__(protocol)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]  # torch's has a keyword
        return repr(self.wide())

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]  # stub lacks cls
        if func is torch.ops.aten.detach.default:  # autograd does, as it makes it a parameter's
            return cls._of(args[0]._held)
        args, kwargs = tree_map_only(NarrowGradient, NarrowGradient.wide, (args, kwargs or {}))
        return func(*args, **kwargs)
