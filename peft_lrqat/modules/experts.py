"""The experts of a mixture as modules: transformers 5 keeps them in parameters of three dimensions.

transformers holds a projection of all experts of a layer in one parameter (experts, out, in), and computes with one of
several functions (`config._experts_implementation`), which read `self.gate_up_proj` and `self.down_proj`. What is on a
grid is not one float tensor. So `Experts` takes the place of such a module, with a child for each projection, and in
every forward

1. finds the experts that tokens were sent to, and renumbers the router's choice among them;
2. asks each child for the weights of those, (n, out, in), and of no others;
3. lets transformers' own function, whichever is set, work on a stand-in of the module that has these weights.

So whatever transformers computes (activations, gates, the order of sums) is computed here, and the products are the
same whether a child builds its weights of integers and an adapter or of a merged checkpoint's codes.

Memory. The weights of one layer of a large mixture are a gigabyte. With grouped products (`grouped_mm`, transformers'
default) a child may multiply itself instead, some experts at a time, so that no more exists: what transformers'
function then gets for weights is a `Grouped`, which is as good for that product and for nothing else. Elsewhere the
built weights live as long as this forward. transformers' products would keep them for backward, all layers' at once;
instead a note is kept, from which they are built again (`_rebuilt_in_backward`), of exactly the experts that the
product wants. Under gradient checkpointing all other tensors go on to checkpointing's own hooks.

A merged model has a QuantizedLinear for every expert and projection, as the files of the architecture have them
(`experts.0.gate_proj`, ...): everything that reads, writes and describes layers reads, writes and describes these.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..ops.dispatch import in_autocast_dtype
from .carry import carry_hooks

#: What a projection is called, and the parts of it that files hold, for one expert, in the order of their rows.
Parts = Mapping[str, tuple[str, ...]]


class Built(NamedTuple):
    """The weights of some experts, in one projection."""

    weight: torch.Tensor  # (n, out, in)
    again: Callable[[slice], torch.Tensor]  # builds those of some of these n experts again, without a graph


class Grouped:
    """Passes for the weights of all experts in a grouped product, which it computes without building them as a whole.

    It knows what transformers asks of weights on the way to that product, and nothing else of a tensor.
    """

    def __init__(
        self, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        """
        Args:
            product: x (T, in), and where the tokens of each expert end, (E,), to (T, out): see `ops.expert_linear`.
        """
        self._product, self.dtype, self.device = product, dtype, device

    def transpose(self, first: int, second: int) -> Grouped:
        return self

    def data_ptr(self) -> int:
        """An address that is aligned to anything."""
        return 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if "grouped_mm" not in getattr(func, "__name__", str(func)):
            raise TypeError(f"The weights of experts on a grid take part in grouped products only, not in {func}.")
        x, weights = args
        return weights._product(x, (kwargs or {})["offs"])


def is_stacked(module: nn.Module) -> bool:
    """Whether a module holds experts as transformers 5 does: parameters of three dimensions, one of its functions."""
    flags = ("has_gate", "is_transposed", "num_experts")  # what transformers sets where it chooses the function
    return all(hasattr(module, flag) for flag in flags) and bool(projections(module))


def projections(module: nn.Module) -> list[str]:
    """The names of the parameters of three dimensions."""
    return [name for name, parameter in module._parameters.items() if parameter is not None and parameter.ndim == 3]


class ExpertStack(nn.Linear):
    """One float projection of all experts, as a matrix: expert e has the rows e * out to (e + 1) * out.

    Attributes:
        weight: (experts * out, in), over the memory of the parameter that it was made of.
        experts: how many.
    """

    experts: int

    def __init__(self, weight: torch.Tensor) -> None:
        """
        Args:
            weight: (experts, out, in).
        """
        nn.Module.__init__(self)
        self.experts, out_features, self.in_features = weight.shape
        self.out_features = self.experts * out_features
        matrix = weight.detach().reshape(-1, self.in_features)
        self.weight = nn.Parameter(matrix, requires_grad=weight.requires_grad)
        self.register_parameter("bias", None)

    @property
    def stacked(self) -> torch.Tensor:
        """(experts, out, in)."""
        return self.weight.view(self.experts, -1, self.in_features)

    def forward(self, experts: torch.Tensor | None, dtype: torch.dtype) -> Built:  # type: ignore[override]  # see there
        """The weights of some experts: see `Experts`."""
        weight = self.stacked if experts is None else self.stacked[experts]
        return Built(weight.to(dtype), lambda which: weight[which].detach().to(dtype))

    def kept(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None


class _Parts:
    """A projection whose parts are a layer for each expert."""

    def __init__(self, experts: nn.Module, names: tuple[str, ...]) -> None:
        self._experts, self._names = experts, names

    def kept(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None

    def __call__(self, experts: torch.Tensor | None, dtype: torch.dtype) -> Built:
        wanted = range(self._experts.num_experts) if experts is None else experts.tolist()  # type: ignore[arg-type]

        def build(which: slice) -> torch.Tensor:
            with torch.no_grad():
                of_experts = [[self._dense(e, name, dtype) for name in self._names] for e in wanted[which]]
                return torch.stack([torch.cat(of_expert) for of_expert in of_experts])

        return Built(build(slice(None)), build)

    def _dense(self, expert: int, name: str, dtype: torch.dtype) -> torch.Tensor:
        layer: Any = self._experts.get_submodule(f"{expert}.{name}")
        if not hasattr(layer, "_dense"):
            raise ValueError(
                f"A single expert of a quantized model carries a {type(layer).__name__}, but experts are computed "
                "together. Leave them out of the adapter (`exclude_modules=r'.*\\.experts\\..*'`), or train them with "
                "LRQATConfig, which takes all of a layer."
            )
        kept = layer._kept_weight(dtype)
        return layer._dense(dtype) if kept is None else kept


class Experts(nn.Module):
    """The experts of one layer of a mixture, with modules for their weights.

    Children, beside those of transformers' module: one for each projection, which has
        forward(experts, dtype) -> Built: experts int64 (n,), None: all; differentiable in what is trained;
        grouped(dtype) -> Grouped, where it multiplies itself, part by part: None, or no such method, where it does not;
        kept(dtype): all weights, (experts, out, in), where the layer keeps them while the model generates; else None;
    or, for each expert, one with a layer for each part of the projections.

    Attributes:
        num_experts: how many.
        parts: see `Parts`.
    """

    num_experts: int
    _hides = False  # within methods of torch that go by what is stored

    @property
    def _parameters(self) -> dict[str, Any]:
        """Its own, and while adapters are merged in place the weights to be read of what its layers hold."""
        own = vars(self)["_parameters"]
        shown: dict[str, Any] = {}
        for name, stack in {} if self._hides else self.stacks.items():
            shown |= getattr(getattr(stack, "base_layer", stack), "served", lambda names: {})(self.parts[name])
        return {**shown, **own} if shown else own

    @_parameters.setter
    def _parameters(self, parameters: dict[str, Any]) -> None:
        vars(self)["_parameters"] = parameters

    def _apply(self, *args: Any, **kwargs: Any) -> Experts:
        with self._as_stored():
            return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._as_stored():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        with self._as_stored():
            super()._load_from_state_dict(*args)

    @contextlib.contextmanager
    def _as_stored(self) -> Iterator[None]:
        before, self._hides = self._hides, True
        try:
            yield
        finally:
            self._hides = before

    def __init__(self, module: nn.Module, parts: Parts) -> None:
        """
        Args:
            module: transformers'. It is left as it is, and its parameters are shared.
        """
        super().__init__()
        shell = copy.copy(module)  # not deeply: hooks may be methods of anything
        for own in ("_hf_hook", "_old_forward", "forward"):  # accelerate's, which `carry_hooks` hooks anew
            vars(shell).pop(own, None)
        shell._parameters = {name: p for name, p in module._parameters.items() if name not in parts}
        self.num_experts, self.parts = module.num_experts, dict(parts)  # type: ignore[assignment]
        for name, child in module.named_children():
            self.add_module(name, child)
        for name, parameter in shell._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
        for name in parts:
            self.add_module(name, ExpertStack(module.get_parameter(name)))
        carry_hooks(module, self)
        # last, because its attributes pass for those of this module, and outside of the module tree
        object.__setattr__(self, "_shell", shell)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            shell = vars(self).get("_shell")
            if shell is None:
                raise
            if name in self.parts and not self.stacks:  # for models that initialize it, to no effect
                return self._initialized
            return getattr(shell, name)

    @property
    def _initialized(self) -> torch.Tensor:
        """What transformers may take for a projection of experts that are layers of their own."""
        nothing = torch.empty(0, device="meta")
        nothing._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark
        return nothing

    @property
    def stacks(self) -> dict[str, Any]:
        """The projections that are one layer each."""
        return {name: self._modules[name] for name in self.parts if name in self._modules}

    @torch.compiler.disable  # which experts were hit is known when they are: a break in the graph, here and only here
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states (tokens, in), the router's choice int64 (tokens, k) and its weights (tokens, k) to
        (tokens, in)."""
        dtype = in_autocast_dtype(hidden_states[:0]).dtype
        sources: dict[str, Any] = {name: self._modules.get(name) or _Parts(self, of) for name, of in self.parts.items()}
        # not where somebody wants to see the calls of the layers, as PEFT does to choose adapters sample by sample
        kept = {n: None if getattr(s, "_forward_pre_hooks", ()) else s.kept(dtype) for n, s in sources.items()}
        if all(weight is not None for weight in kept.values()):
            return self._run(kept, self.num_experts, hidden_states, top_k_index, top_k_weights)
        if grouped := self._grouped(sources, dtype):
            return self._run(grouped, self.num_experts, hidden_states, top_k_index, top_k_weights)
        hit, index = torch.unique(top_k_index, return_inverse=True)
        if not len(hit):  # no token: what is trained has a gradient of zeros all the same
            built = [source(top_k_index.new_zeros(1), dtype).weight for source in sources.values()]
            return hidden_states + torch.stack([weight.sum() * 0 for weight in built]).sum().to(hidden_states.dtype)
        experts = None if len(hit) == self.num_experts else hit
        found = {name: source(experts, dtype) for name, source in sources.items()}
        weights = {name: built.weight for name, built in found.items()}
        with _rebuilt_in_backward(list(found.values())):
            return self._run(weights, len(hit), hidden_states, index, top_k_weights)

    def _grouped(self, sources: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Grouped]:
        """What passes for the weights where transformers' function is that of grouped products; nothing where some
        layer must build its own, or others want to see that it is called."""
        if self.config._experts_implementation != "grouped_mm" or self.has_bias:
            return {}
        found: dict[str, Any] = {}
        for name, source in sources.items():
            hooked = [vars(source).get(one) for one in ("_forward_pre_hooks", "_forward_hooks", "forward")]
            found[name] = None if any(hooked) or not hasattr(source, "grouped") else source.grouped(dtype)
        return {} if None in found.values() else found

    def observe(self, see: Callable[[str, torch.Tensor, torch.Tensor], None], *inputs: torch.Tensor) -> None:
        """Tell what each projection multiplies, of float stacks; whichever of its functions transformers uses.

        Args:
            see: is called with the name of a projection, its inputs (T, in), those of an expert behind those of the one
                before, and where they end, int (experts,).
            inputs: those of `forward`.
        """

        def product(name: str, stack: ExpertStack, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            see(name, x, ends)
            of_each = zip(x.tensor_split(ends[:-1].long().cpu()), stack.stacked, strict=True)
            return torch.cat([nn.functional.linear(rows, weight.to(x.dtype)) for rows, weight in of_each])

        seen = {
            name: Grouped(partial(product, name, s), s.weight.dtype, s.weight.device) for name, s in self.stacks.items()
        }
        ALL_EXPERTS_FUNCTIONS["grouped_mm"](self._stand_in(seen, self.num_experts), *inputs)

    def _run(self, weights: Mapping[str, Any], count: int, *inputs: torch.Tensor) -> torch.Tensor:
        """transformers' function, with these weights of so many experts."""
        stand_in = self._stand_in(weights, count)
        return type(stand_in).forward(stand_in, *inputs)

    def _stand_in(self, weights: Mapping[str, Any], count: int) -> Any:
        """transformers' module, with these weights of so many experts."""
        shell = vars(self)["_shell"]
        stand_in = object.__new__(type(shell))
        children = {name: child for name, child in self._modules.items() if name in shell._modules}
        own = {"_parameters": self._parameters, "_buffers": self._buffers, "_modules": children}
        vars(stand_in).update({**vars(shell), **own, **weights, "num_experts": count})
        return stand_in

    def take_apart(self) -> None:
        """Have a float layer without values for each expert and part, for files to fill."""
        for projection, names in self.parts.items():
            stack: Any = self._modules.pop(projection)
            rows = stack.out_features // (self.num_experts * len(names))
            for e in range(self.num_experts):
                if str(e) not in self._modules:
                    self.add_module(str(e), nn.ModuleDict())
                layers: Any = self._modules[str(e)]
                for name in names:
                    layers[name] = nn.Linear(stack.in_features, rows, False, "meta", stack.weight.dtype)

    def original(self) -> nn.Module:
        """transformers' module, of float stacks."""
        module = copy.copy(vars(self)["_shell"])
        module._parameters = dict(self._parameters)
        for name in self.parts:
            stack: Any = self._modules[name]
            module.register_parameter(name, nn.Parameter(stack.stacked, requires_grad=stack.weight.requires_grad))
        module._modules = {name: child for name, child in self._modules.items() if name not in self.parts}
        carry_hooks(self, module)
        return module

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"


@contextlib.contextmanager
def _rebuilt_in_backward(built: list[Built]) -> Iterator[None]:
    """Operations in this context do not keep these weights for backward, but how to build them."""
    if not torch.is_grad_enabled():
        yield
        return
    by_storage = {one.weight.untyped_storage().data_ptr(): one for one in built}
    # private, of torch 2.10 to 2.13: without it the activations of a checkpointed layer stay in memory, nothing worse
    outside = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore: None)(True)
    pack_outside, unpack_outside = outside or (lambda tensor: tensor, lambda packed: packed)

    def pack(tensor: torch.Tensor) -> Any:
        one = by_storage.get(tensor.untyped_storage().data_ptr())
        return pack_outside(tensor) if one is None else _Note(one, tensor)

    def unpack(packed: Any) -> torch.Tensor:
        return packed.tensor() if isinstance(packed, _Note) else unpack_outside(packed)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        by_storage.clear()  # what is kept for backward has a reference to `pack`


class _Note:
    """How to build a view of built weights again."""

    def __init__(self, built: Built, view: torch.Tensor) -> None:
        self._again, self._dtype = built.again, view.dtype
        self._size, self._stride = view.shape, view.stride()
        out_features, in_features = built.weight.shape[1:]
        numbers = out_features * in_features  # of an expert
        first = view.storage_offset() - built.weight.storage_offset()
        last = first + sum((size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True))
        self._experts = slice(first // numbers, last // numbers + 1)
        self._offset = first - self._experts.start * numbers

    def tensor(self) -> torch.Tensor:
        with torch.no_grad():
            weight = self._again(self._experts)
        return weight.as_strided(self._size, self._stride, weight.storage_offset() + self._offset)
