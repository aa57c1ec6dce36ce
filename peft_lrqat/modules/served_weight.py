"""The weight of a merged layer as a parameter without storage, for those who copy a model into an engine.

TRL syncs a policy to vLLM by walking `named_parameters()` of the merged model, and sends `param.data` (under FSDP2
`param.full_tensor()`) under the name that the float model has. A merged layer holds packed codes, so that walk would
pass it by, and the engine would go on with the weights it had. So, while adapters are merged in place, the layer shows
a `ServedWeight` under the name `weight`: shape, dtype and device of the float weight, and no bytes. Whoever reads it
gets a plain dense tensor that is built for this one reading; the layer keeps none, so that walking a whole model needs
the memory of one layer.

It is shown by `named_parameters()` alone. State dicts, files, copies and `model.to()` go by what the layer stores
(`rounded_input.KeepsScales`), and writing to it is an error: there is nothing to write to.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..read_only import arguments_written


class _Moved(torch.Tensor):
    """A dense tensor that answers `full_tensor()`: TRL first moves a parameter off the CPU, and then gathers it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's docs do it

    def full_tensor(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


class ServedWeight(torch.Tensor):
    """An nn.Parameter that is built from a merged layer each time that it is read.

    Raises:
        ValueError: it is read, but the layer rounds its inputs, so that its weight alone is not what was trained.
        RuntimeError: it is read when the layer is gone (unmerged), or written to.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's docs do it

    _is_param = True  # isinstance(..., nn.Parameter)

    @staticmethod
    def __new__(cls, layer: Any, transposed: bool = False, **of_parameters: Any) -> ServedWeight:
        """
        Args:
            layer: a merged layer, with `weight`, (out, in), and its description. It is not kept alive.
            transposed: show (in, out), as a Conv1D has it.
            **of_parameters: nobody's, but accelerate's, which makes a parameter anew to move it.

        Raises:
            ValueError: `layer` is a tensor, from which accelerate would make one.
        """
        if isinstance(layer, torch.Tensor):
            raise ValueError(
                "accelerate moves this model (`cpu_offload`, `disk_offload`, `dispatch_model`) while adapters are "
                "merged in place, and the weights that it then shows are built for reading. Move what "
                "`merge_and_unload()` returns, or call `unmerge_adapter()` before."
            )
        shape = (layer.out_features, layer.in_features)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape[::-1] if transposed else shape, dtype=layer.compute_dtype, device=layer.weight_scale.device
        )

    def __init__(self, layer: Any, transposed: bool = False) -> None:
        self._layer, self._transposed = weakref.ref(layer), transposed

    def full_tensor(self) -> torch.Tensor:
        """The dense weight: a plain tensor, built anew."""
        layer = self._layer()
        if layer is None:
            raise RuntimeError("This weight was shown by a merged layer, which is unmerged by now: merge it again.")
        refuse_rounded_inputs(getattr(layer, "activations", None))
        refuse_rounded_cache(getattr(layer, "kv_bits", None))
        with torch.no_grad():
            weight = layer.weight._plain
            return weight.t().contiguous() if self._transposed else weight

    @property
    def data(self) -> torch.Tensor:
        """The dense weight; what is written to it reaches nobody."""
        return self.full_tensor()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _refuse_writing("data = ...")

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The dense weight on another device or in another dtype; it has `full_tensor()` as well."""
        return self.full_tensor().to(*args, **kwargs).as_subclass(_Moved)

    def __deepcopy__(self, memo: dict) -> nn.Parameter:
        return nn.Parameter(self.full_tensor(), requires_grad=False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.full_tensor(), requires_grad=False).__reduce_ex__(protocol)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]  # torch's has a keyword
        return f"ServedWeight({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]  # stub lacks cls
        kwargs = kwargs or {}
        if any(isinstance(written, ServedWeight) for written in arguments_written(func, args, kwargs)):
            _refuse_writing(func._schema.name.split("::")[-1])
        args, kwargs = tree_map_only(ServedWeight, ServedWeight.full_tensor, (args, kwargs))
        return func(*args, **kwargs)


def refuse_rounded_inputs(activations: Any) -> None:
    """ValueError if the inputs of a layer are rounded by a rule (None: they are not), and its weight is to be sent."""
    if activations is not None:
        raise ValueError(
            "The layers of this model round their inputs (`act_bits`), but an engine to which float weights are sent "
            "does not: it would sample from another policy than the one that is trained. Leave `act_bits` "
            "out where vLLM generates, or let transformers generate (`use_vllm=False`)."
        )


def refuse_rounded_cache(kv_bits: int | None) -> None:
    """ValueError if the model of a layer, whose weight is to be sent, rounds its KV cache (None: it does not)."""
    if kv_bits is not None:
        raise ValueError(
            f"The model rounds its KV cache (`kv_bits={kv_bits}`), but an engine to which float weights are sent does "
            "not: it would sample from another policy than the one that is trained. Leave `kv_bits` out where vLLM "
            "generates, or let transformers generate (`use_vllm=False`)."
        )


def _refuse_writing(name: str) -> None:
    raise RuntimeError(
        f"`{name}` would write to the weight of a merged layer, which is built from packed integers for each reading. "
        "Unmerge the adapter to go on training it."
    )
