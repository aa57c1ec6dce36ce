"""A weight's gradient in the dtype in which a product has made it, where autograd wants fp32.

Products of a bf16 model make gradients in bf16. To cast each to the dtype of its fp32 parameter, and to read it so,
takes longer on a GPU than the product did. An optimizer that takes the gradient as soon as it is there can read it as
it is: every bf16 number is one of fp32, so that nothing else is computed. For autograd, and for everybody else, it is
an fp32 tensor: whoever reads or changes it finds one, and sums (of a weight that is used twice, of several backward
passes) are fp32's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class NarrowGradient(torch.Tensor):
    """An fp32 gradient whose values are held in a narrower dtype, until somebody looks at it."""

    _held: list[torch.Tensor]  # the one tensor; in a list, because a detached gradient has its values in common with it

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's docs do it

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> NarrowGradient:
        return cls._of([values])

    def __init__(self, *args: Any) -> None:
        pass

    @classmethod
    def _of(cls, held: list[torch.Tensor]) -> NarrowGradient:
        (values,) = held
        self = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32, device=values.device)
        self._held = held
        return self

    @property
    def held(self) -> torch.Tensor:
        """The gradient as it is held: a plain tensor, narrow or already fp32."""
        return self._held[0]

    def wide(self) -> torch.Tensor:
        """Return the gradient as a plain fp32 tensor, as it is held from then on."""
        if self._held[0].dtype != torch.float32:
            self._held[0] = self._held[0].float()
        return self._held[0]

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
