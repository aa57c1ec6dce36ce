"""Checkpointed blocks of a model as CUDA graphs.

At small batches a training step waits for Python: checkpointing, autocast, autograd and some hundred launches a block.
Here each block that gradient checkpointing computes again is two graphs, which an `autograd.Function` replays:

    forward     the block on its input; keeps that input alone, as checkpointing does
    backward    the block again on that input, then the gradients of the input and of all that is trained

Memory. A graph reads and writes fixed addresses. What goes in and out (the hidden state, its gradient, masks, rotary
tables, the gradients of a block's parameters) has one buffer for all blocks, which is copied into before a replay, and
out of after it. Intermediate results lie in one pool for all graphs, and none outlives its graph. So the whole costs
the activations of one block, which checkpointing needs in backward anyway, and about four hidden states.

When. The first call of a block with inputs of some shapes runs as ever, so that libraries and Triton are ready. Before
the next one is recorded, it runs once more on the buffers, and is looked at: a block that waits for the GPU, draws
random numbers or writes to its input is no graph. `BlockState` tells when a graph no longer holds. Whatever cannot be a
graph runs by the checkpoint function that the model had, with one warning that says why.
"""

from __future__ import annotations

import atexit
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from ..ops.dispatch import kernels_for
from ..ops.narrow_gradient import Lender
from .block_recording import BlockGraph, Buffer, Replay, Unfit, first_line, flatten, meta, rebuild, recorder_for
from .block_state import BlockState, why_unfit

logger = logging.get_logger(__name__)

#: Those that are attached. At exit they are released while CUDA is still there.
_ATTACHED: weakref.WeakSet[BlockGraphs] = weakref.WeakSet()

#: As many combinations of shapes become graphs, and each block is recorded anew as often.
LIMIT = 8

_SHAPES = (
    f"inputs come in more shapes than the {LIMIT} that become graphs. Make them alike: `pad_to_multiple_of=256` in "
    "SFTConfig, or `packing=True` with `packing_strategy='wrapped'`"
)


class _Block:
    """What a block has for its checkpoint function: it replays graphs, or calls the one that was there."""

    def __init__(self, owner: BlockGraphs, name: str, layer: nn.Module, ordinary: Callable[..., Any]) -> None:
        self.owner, self.name, self.ordinary = owner, name, ordinary
        self._layer = weakref.ref(layer)
        self._state: BlockState | None = None
        self._graphs: dict[tuple, BlockGraph | None] = {}
        self._times = 0
        self.off = False
        self.first = False  # of all blocks

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.ordinary  # a copy of the model is another model

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.ordinary,)

    def __call__(self, function: Any, *args: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.ordinary(function, *args)
        try:
            if self.first:
                self.owner.forget()
            found = None if self.off else self._find(function, args)
        except Unfit as reason:
            self.owner.warn(f"{self.name!r}: {reason}")
            self.off, self._state, self._graphs = True, None, {}
            found = None
        if found is None:
            self.owner.counts["ordinary"] += 1
            return self.ordinary(function, *args)
        graph, inputs = found
        self.owner.counts["replayed"] += 1
        outputs = Replay.apply(graph, len(inputs), *inputs, *graph.state.parameters)
        return rebuild(iter(graph.layout), iter(outputs))

    def _find(self, function: Any, args: tuple) -> tuple[BlockGraph, list[Tensor]] | None:
        """The graph for a call, and its tensors; None: this call runs as ever."""
        block, called, rest, named = self._taken_apart(function)
        inputs: list[Tensor] = []
        layout: list[Any] = []
        flatten(((*rest, *args), named), inputs, layout)
        place = self.owner.recorder.place()
        if not inputs or place is None or _any_global_hook():
            return None
        if (other := next((t.device for t in inputs if t.device != self.owner.device), None)) is not None:
            raise Unfit(f"it is given a tensor on {other}, whose values would be those of the recording for good")
        if self._state is not None and (changed := self._state.changed()) is not None:
            self._state, self._graphs = None, {}
            if self._times >= LIMIT:
                raise Unfit(f"{changed!r} has changed again and again, each time for new graphs")
        kind = inputs[0].device.type
        shapes = (tuple(layout), tuple([meta(t) for t in inputs]))
        key = (
            getattr(function.func, "__func__", function.func),
            shapes,
            tuple([t.requires_grad for t in inputs]),
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            _settings(inputs[0]),
            place,
        )
        if key not in self._graphs:
            if len(self._graphs) < 8 * LIMIT:
                self._graphs[key] = None
            else:
                self.owner.warn(_SHAPES)
            return None
        graph = self._graphs[key]
        if graph is None:
            if not self.owner.admits(shapes):
                return None
            graph = self._graphs[key] = self._record(block, called, layout, inputs)
        return graph, inputs

    def _taken_apart(self, function: Any) -> tuple[Any, Callable[..., Any], tuple, dict[str, Any]]:
        """The block, its forward as a function of all arguments, and the arguments that transformers has bound to it:
        `partial(forward, block, **named)`, or `partial(block.__call__, **named)` before 5.23."""
        layer: Any = self._layer()
        if isinstance(function, functools.partial) and layer is not None:
            if getattr(function.func, "__self__", None) is layer:
                return layer, function.func, function.args, function.keywords
            if function.args and function.args[0] is layer:
                return layer, functools.partial(function.func, layer), function.args[1:], function.keywords
        raise Unfit("it is not called as transformers calls its blocks")

    def _record(
        self, block: nn.Module, called: Callable[..., Any], layout: list[Any], inputs: list[Tensor]
    ) -> BlockGraph:
        own = not isinstance(called, functools.partial)  # `__call__` runs the block's own hooks
        if (reason := why_unfit(block, hooks_of_itself=own)) is not None:
            raise Unfit(reason)
        if self._state is None:
            self._state = BlockState(block)
        self._times += 1

        def run(*tensors: Tensor) -> Any:
            args, named = rebuild(iter(layout), iter(tensors))
            return called(*args, **named)

        try:
            graph = BlockGraph(self.owner, self._state, run, inputs)
        except Unfit:
            raise
        except Exception as error:
            self.owner.stop()
            raise Unfit(f"recording it failed: {type(error).__name__}: {first_line(error)}") from error
        self.owner.counts["recorded"] += 1
        return graph


class BlockGraphs:
    """The checkpointed blocks of a model as CUDA graphs, from `attach` to `detach`.

    Attributes:
        counts: how often a block was recorded, replayed, and called as ever with gradients.
        lender: hands gradients of low-bit weights out of the shared results.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Raises:
            ValueError: nothing in the model is checkpointed, its blocks lie on several devices, or hold what a graph
                could not repeat.
        """
        self._layers = _checkpointed(model)
        devices = {p.device for layer in self._layers.values() for p in layer.parameters()}
        if len(devices) > 1:
            raise ValueError(
                f"CUDA graphs of blocks need all blocks on one GPU, but they lie on "
                f"{', '.join(sorted(map(str, devices)))}. Start one process for each GPU, leave `device_map` and "
                "`offload_base` out, or leave the graphs out."
            )
        for name, layer in self._layers.items():
            if (reason := why_unfit(layer, hooks_of_itself=False)) is not None:
                raise ValueError(f"Block {name!r} cannot be a CUDA graph: {reason}. Change that, or leave graphs out.")
        self.device = next(iter(devices))
        self.recorder = recorder_for(self.device)
        if self.recorder is None:
            logger.warning(f"The model is on {self.device}, so its blocks run without CUDA graphs.")
        self.counts = {"recorded": 0, "replayed": 0, "ordinary": 0}
        self._blocks: dict[str, _Block] = {}
        self._buffers: dict[tuple, Buffer] = {}
        self._results: dict[tuple, Tensor] = {}
        self.lender = Lender()  # of the results
        self._shapes: set[tuple] = set()
        self._warned: set[str] = set()

    def attach(self) -> None:
        """Take the place of the checkpoint function of each block, also where somebody has set it anew."""
        if self.recorder is None:
            return
        _ATTACHED.add(self)
        for name, layer in self._layers.items():
            ordinary = layer._gradient_checkpointing_func
            if isinstance(ordinary, _Block) and ordinary.owner is self:
                continue
            ordinary = _ordinary(ordinary)
            block = self._blocks.get(name)
            if block is None:
                block = self._blocks[name] = _Block(self, name, layer, ordinary)
            block.ordinary, block.first = ordinary, layer is next(iter(self._layers.values()))
            layer._gradient_checkpointing_func = block

    def detach(self) -> None:
        """Give the blocks their own functions back, and free graphs and buffers."""
        for layer in self._layers.values():
            block = getattr(layer, "_gradient_checkpointing_func", None)
            if isinstance(block, _Block) and block.owner is self:
                layer._gradient_checkpointing_func = block.ordinary
        self._blocks, self._buffers, self._results = {}, {}, {}
        _ATTACHED.discard(self)

    def buffer(self, what: str, place: int, like: Tensor) -> Buffer:
        """The buffer for a tensor: all blocks that have one alike in this place share it."""
        key = (what, place, meta(like))
        if key not in self._buffers:
            self._buffers[key] = Buffer(like)
        return self._buffers[key]

    def forget(self) -> None:
        """Copy everything anew from now on: another forward may find other values in the tensors of the one before,
        without a version that tells."""
        for buffer in self._buffers.values():
            buffer.forget()

    def result(self, what: str, place: int, like: Tensor) -> Tensor:
        """What graphs write a result to: as `buffer`."""
        key = (what, place, meta(like))
        if key not in self._results:
            with torch.inference_mode(False):
                self._results[key] = torch.empty_like(like, requires_grad=False)
        return self._results[key]

    def admits(self, shapes: tuple) -> bool:
        """Whether inputs of these shapes become graphs: the first `LIMIT` that come twice do."""
        if shapes in self._shapes:
            return True
        if len(self._shapes) >= LIMIT:
            self.warn(_SHAPES)
            return False
        self._shapes.add(shapes)
        return True

    def warn(self, reason: str) -> None:
        """Say once why something runs without graphs; of several blocks with one reason, for the first."""
        kind = reason.partition(": ")[2] or reason
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(f"CUDA graphs: {reason}. It runs as it would without them.")

    def stop(self) -> None:
        """After a recording has failed: no block is recorded any more."""
        for block in self._blocks.values():
            block.off = True


@atexit.register
def _detach_all() -> None:
    for graphs in list(_ATTACHED):
        graphs.detach()


def _checkpointed(model: nn.Module) -> dict[str, Any]:
    """The blocks that are computed again, by name."""
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}
    if not blocks:
        raise ValueError(
            f"CUDA graphs replay the blocks that transformers checkpoints (`GradientCheckpointingLayer`), and "
            f"{type(model).__name__} has none. Leave them out."
        )
    found = {name: m for name, m in blocks.items() if m.gradient_checkpointing}
    if not found:
        raise ValueError(
            "CUDA graphs replay checkpointed blocks, and gradient checkpointing is off. Switch it on: "
            "`gradient_checkpointing=True` in SFTConfig or TrainingArguments, or "
            "`model.gradient_checkpointing_enable()`."
        )
    for name, layer in found.items():
        function = _ordinary(layer._gradient_checkpointing_func)
        if isinstance(function, functools.partial) and function.keywords.get("context_fn") is not None:
            raise ValueError(
                f"Block {name!r} is checkpointed selectively (`context_fn`; `selective` in SFTConfig's "
                "`gradient_checkpointing_kwargs`), which a graph would not do. Leave one of the two out."
            )
    return found


def _any_global_hook() -> bool:
    """Whether somebody has hooks on all modules, which a replay would not run."""
    asks = getattr(nn.modules.module, "_has_any_global_hook", None)
    return asks is not None and asks()


def _settings(tensor: Tensor) -> tuple:
    """What everybody may set for all of a process, and kernels are chosen by."""
    cuda = torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        kernels_for(tensor),
    )


def _ordinary(function: Any) -> Any:
    """A checkpoint function, also where a training that failed has left a block's."""
    return function.ordinary if isinstance(function, _Block) else function


def _same(value: Any) -> Any:
    return value
