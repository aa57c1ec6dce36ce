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
import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from ..ops.dispatch import kernels_for
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
_CHANGED = (
    "An adapter or a scale was changed in place between forward and backward (an optimizer step, a load, a merge). Run "
    "forward again."
)


# -- recording


class Recorder:
    """Records what a function asks of a GPU as a CUDA graph. All graphs share a pool of memory.

    Args:
        device: of the blocks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = _side_stream(device)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return what repeats `run`, which works on fixed tensors, and keeps none that it makes. It is not run yet."""
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # freeing a graph, or an event, would end the recording
        try:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._side):
                # other threads (of a DataLoader, of NCCL) may ask the device for whatever they want meanwhile
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
            torch.cuda.current_stream(self._device).wait_stream(self._side)
        finally:
            if collects:
                gc.enable()
        return graph.replay

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """A context in which an operation that waits for the GPU raises RuntimeError."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def place(self) -> Any:
        """Where the GPU is asked: graphs of another stream are others'; None: in a recording of somebody else."""
        if torch.cuda.is_current_stream_capturing():
            return None
        return torch.cuda.current_stream(self._device).cuda_stream

    def draws(self) -> Tensor:
        """Changes with every random number that the GPU draws."""
        return torch.cuda.get_rng_state(self._device)

    def undraw(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, self._device)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one on which all graphs of a device are recorded, because memory of a pool belongs to a stream.

    cuBLAS keeps a workspace for each thread and stream. They are made here, for this thread and autograd's: those that
    are made in a recording would hold its pool for good.
    """
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream), torch.enable_grad(), torch.autocast("cuda", enabled=False):
        small = torch.ones(16, 16, device=device, requires_grad=True)
        torch.autograd.grad((small @ small).sum(), small)
    return stream


def recorder_for(device: torch.device) -> Any:
    """Choose how blocks on a device are recorded; None: there is no way."""
    return Recorder(device) if device.type == "cuda" else None


# -- buffers


class _Buffer:
    """A tensor at a fixed address, and what was copied into it last."""

    def __init__(self, like: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            # what a mask repeats by a stride of 0 is kept once
            self._real = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in like.stride())
            real = like[self._real] if like.dim() else like
            self._memory = torch.empty_like(real, memory_format=torch.preserve_format, requires_grad=False)
            self.tensor = self._memory.expand(like.shape)
        self._source: weakref.ref[Tensor] | None = None
        self._version: tuple | None = None

    def take(self, source: Tensor) -> None:
        """Copy a tensor here, unless it is there already."""
        version = None if source.is_inference() else (source._version, source.data_ptr(), source.stride())
        if version is not None and self._source is not None and self._source() is source and self._version == version:
            return
        self._memory.copy_(source.detach()[self._real] if source.dim() else source.detach())
        self._source, self._version = weakref.ref(source), version

    def forget(self) -> None:
        self._source = None


def _meta(tensor: Tensor) -> tuple:
    """What a buffer has to have in common with a tensor."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


# -- the arguments of a block


class _Unfit(Exception):
    """A call that cannot be a graph; the message is a clause that says why."""


class _Tensor:
    """Stands for a tensor in the layout of arguments."""


def _flatten(value: Any, tensors: list[Tensor], layout: list[Any], verb: str = "is given") -> None:
    """Append the tensors in `value` to a list, and what else it is made of to another.

    Args:
        verb: what the block does with `value`, for the message.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        layout.append(_Tensor)
    elif value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        layout.append((type(value), value))
    elif type(value) in (tuple, list):
        layout.append((type(value), len(value)))
        for one in value:
            _flatten(one, tensors, layout, verb)
    elif type(value) is dict:
        layout.append((dict, tuple(value)))
        for one in value.values():
            _flatten(one, tensors, layout, verb)
    else:
        raise _Unfit(f"it {verb} a {type(value).__name__}")


def _rebuild(layout: Iterator[Any], tensors: Iterator[Tensor]) -> Any:
    """Undo `_flatten`."""
    found = next(layout)
    if found is _Tensor:
        return next(tensors)
    kind, value = found
    if kind in (tuple, list):
        return kind(_rebuild(layout, tensors) for _ in range(value))
    if kind is dict:
        return {key: _rebuild(layout, tensors) for key in value}
    return value


# -- graphs


class _Graph:
    """The two graphs of a block for inputs of some shapes."""

    def __init__(self, owner: BlockGraphs, state: BlockState, function: Callable[..., Any], inputs: list[Tensor]):
        """Run the block once on the buffers, and record it.

        Args:
            function: the block, as a function of tensors.
            inputs: those of this call.

        Raises:
            _Unfit: it cannot be a graph.
        """
        self.state, self._owner, self._function = state, owner, function
        self._needed = [i for i, t in enumerate(inputs) if t.requires_grad]
        self.inputs = [owner.buffer("input", i, t) for i, t in enumerate(inputs)]
        kind = inputs[0].device.type
        # weights that were cast are not kept: one of a graph lies in the pool, and one of outside would be gone later
        self._autocast = functools.partial(
            torch.autocast,
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        )
        self._no_autocast = functools.partial(torch.autocast, kind, enabled=False)
        self._load(inputs)
        self._try(inputs)
        recorder = owner.recorder
        self._replay_forward = recorder.record(self._forward)
        self._replay_backward = recorder.record(self._backward)

    def _run(self) -> tuple[list[Tensor], list[Any], list[Tensor]]:
        """The block's outputs, their layout, and the leaves whose gradients are wanted: inputs, then parameters.

        Parameters are stood in for. Nodes in which autograd sums their gradients belong to the stream on which they
        were made, which is not the one that records; and whoever hangs hooks on a parameter wants them run once.
        """
        inputs = [buffer.tensor.detach() for buffer in self.inputs]
        trained = [nn.Parameter(p.detach()) for p in self.state.parameters]
        leaves = [*(inputs[i].requires_grad_() for i in self._needed), *trained]
        outputs: list[Tensor] = []
        layout: list[Any] = []
        # Whoever moves saved tensors elsewhere is not to move those of a graph. What is kept must not know the node
        # that keeps it: such a circle, through C++, is never freed.
        hooks = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda t: t)
        with torch.enable_grad(), self._autocast(), hooks, self.state.with_parameters(trained):
            _flatten(self._function(*inputs), outputs, layout, "returns")
        return outputs, layout, leaves

    def _gradients(self, outputs: list[Tensor], leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """For the gradients that have arrived."""
        arriving = [buffer.tensor for buffer in self.arriving]
        with self._no_autocast():
            reached = [outputs[i] for i in self.differentiable]
            return list(torch.autograd.grad(reached, leaves, arriving, allow_unused=True))

    def _holds(self, inputs: list[Tensor]) -> bool:
        """Whether the buffers have the inputs' values. Kernels of others write without a word."""
        there = [(buffer.tensor, t.detach()) for buffer, t in zip(self.inputs, inputs, strict=True)]
        return all(bool(((a == b) | (a != a)).all()) for a, b in there)

    def _try(self, inputs: list[Tensor]) -> None:
        """Run both once, make the buffers for what comes out, and refuse what a graph could not repeat."""
        recorder = self._owner.recorder
        drawn, drawn_here = recorder.draws(), torch.get_rng_state()
        before = [buffer.tensor._version for buffer in self.inputs]
        try:
            with recorder.no_waiting():
                grads = self._run_both()
            if not (torch.equal(drawn, recorder.draws()) and torch.equal(drawn_here, torch.get_rng_state())):
                raise _Unfit("it draws random numbers, and the recomputation would draw others (set dropout to 0)")
        except BaseException as error:
            recorder.undraw(drawn)
            torch.set_rng_state(drawn_here)
            if isinstance(error, RuntimeError) and "synchroniz" in str(error):
                raise _Unfit(
                    "it waits for the GPU, as mixtures of experts do to count tokens, and other code to look at values "
                    f"({_first_line(error)})"
                ) from error
            raise
        if [buffer.tensor._version for buffer in self.inputs] != before or not self._holds(inputs):
            raise _Unfit("it writes to its input")
        self._present = [i for i, g in enumerate(grads) if g is not None]
        self._grads = [self._owner.result("gradient", i, g) for i, g in enumerate(grads) if g is not None]

    def _run_both(self) -> list[Tensor | None]:
        """The gradients of a first run, of zeros that arrive."""
        outputs, self.layout, leaves = self._run()
        if self.layout[0] is not _Tensor and self.layout[0][0] is not tuple:
            raise _Unfit(f"it returns a {self.layout[0][0].__name__}")
        self.differentiable = [i for i, t in enumerate(outputs) if t.requires_grad]
        if not self.differentiable:
            raise _Unfit("nothing that it returns depends on anything that is trained")
        self.outputs = [self._owner.result("output", i, t) for i, t in enumerate(outputs)]
        self.arriving = [self._owner.buffer("arriving", i, self.outputs[i]) for i in self.differentiable]
        with torch.no_grad():
            for buffer in self.arriving:
                buffer.tensor.zero_()
                buffer.forget()
        count = len(leaves)
        grads = self._gradients(outputs, [*leaves, *self.state.parameters])
        if any(grad is not None for grad in grads[count:]):
            raise _Unfit("it uses a parameter that it has not only registered, but keeps elsewhere too")
        return grads[:count]

    def _forward(self) -> None:
        outputs, _, _ = self._run()
        with torch.no_grad():
            for there, here in zip(self.outputs, outputs, strict=True):
                there.copy_(here)

    def _backward(self) -> None:
        outputs, _, leaves = self._run()
        grads = self._gradients(outputs, leaves)
        with torch.no_grad():
            torch._foreach_copy_(self._grads, [g for g in grads if g is not None])

    def _load(self, inputs: list[Tensor]) -> None:
        for buffer, tensor in zip(self.inputs, inputs, strict=True):
            buffer.take(tensor)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """The block's outputs: new tensors."""
        self._load(inputs)
        self._replay_forward()
        return _copies(self.outputs)

    def backward(self, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor | None]:
        """Gradients of the inputs that need one, and of the parameters: new tensors, or None where there is none."""
        self._load(inputs)
        for buffer, i in zip(self.arriving, self.differentiable, strict=True):
            buffer.forget()  # a kernel may write to what arrives
            buffer.take(grads[i])
        self._replay_backward()
        found: list[Tensor | None] = [None] * (len(self._needed) + len(self.state.parameters))
        for i, copied in zip(self._present, _copies(self._grads), strict=True):
            found[i] = copied
        of_inputs: list[Tensor | None] = [None] * len(inputs)
        for i, grad in zip(self._needed, found, strict=False):
            of_inputs[i] = grad
        return [*of_inputs, *found[len(self._needed) :]]


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(t) for t in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


class _Replay(torch.autograd.Function):
    """A block: inputs and parameters to outputs."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, count: int, *tensors: Tensor) -> Any:
        inputs = tensors[:count]
        outputs = graph.forward(list(inputs))
        ctx.graph, ctx.versions = graph, graph.state.versions()
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(*(t for i, t in enumerate(outputs) if i not in graph.differentiable))
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.versions != ctx.graph.state.versions():
            raise RuntimeError(_CHANGED)
        return None, None, *ctx.graph.backward(list(ctx.saved_tensors), list(grads))


# -- blocks


class _Block:
    """What a block has for its checkpoint function: it replays graphs, or calls the one that was there."""

    def __init__(self, owner: BlockGraphs, name: str, layer: nn.Module, ordinary: Callable[..., Any]) -> None:
        self.owner, self.name, self.ordinary = owner, name, ordinary
        self._layer = weakref.ref(layer)
        self._state: BlockState | None = None
        self._graphs: dict[tuple, _Graph | None] = {}
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
        except _Unfit as reason:
            self.owner.warn(f"{self.name!r}: {reason}")
            self.off, self._state, self._graphs = True, None, {}
            found = None
        if found is None:
            self.owner.counts["ordinary"] += 1
            return self.ordinary(function, *args)
        graph, inputs = found
        self.owner.counts["replayed"] += 1
        outputs = _Replay.apply(graph, len(inputs), *inputs, *graph.state.parameters)
        return _rebuild(iter(graph.layout), iter(outputs))

    def _find(self, function: Any, args: tuple) -> tuple[_Graph, list[Tensor]] | None:
        """The graph for a call, and its tensors; None: this call runs as ever."""
        block, called, rest, named = self._taken_apart(function)
        inputs: list[Tensor] = []
        layout: list[Any] = []
        _flatten(((*rest, *args), named), inputs, layout)
        place = self.owner.recorder.place()
        if not inputs or place is None or _any_global_hook():
            return None
        if (other := next((t.device for t in inputs if t.device != self.owner.device), None)) is not None:
            raise _Unfit(f"it is given a tensor on {other}, whose values would be those of the recording for good")
        if self._state is not None and (changed := self._state.changed()) is not None:
            self._state, self._graphs = None, {}
            if self._times >= LIMIT:
                raise _Unfit(f"{changed!r} has changed again and again, each time for new graphs")
        kind = inputs[0].device.type
        shapes = (tuple(layout), tuple([_meta(t) for t in inputs]))
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
        raise _Unfit("it is not called as transformers calls its blocks")

    def _record(self, block: nn.Module, called: Callable[..., Any], layout: list[Any], inputs: list[Tensor]) -> _Graph:
        own = not isinstance(called, functools.partial)  # `__call__` runs the block's own hooks
        if (reason := why_unfit(block, hooks_of_itself=own)) is not None:
            raise _Unfit(reason)
        if self._state is None:
            self._state = BlockState(block)
        self._times += 1

        def run(*tensors: Tensor) -> Any:
            args, named = _rebuild(iter(layout), iter(tensors))
            return called(*args, **named)

        try:
            graph = _Graph(self.owner, self._state, run, inputs)
        except _Unfit:
            raise
        except Exception as error:
            self.owner.stop()
            raise _Unfit(f"recording it failed: {type(error).__name__}: {_first_line(error)}") from error
        self.owner.counts["recorded"] += 1
        return graph


class BlockGraphs:
    """The checkpointed blocks of a model as CUDA graphs, from `attach` to `detach`.

    Attributes:
        counts: how often a block was recorded, replayed, and called as ever with gradients.
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
        self._buffers: dict[tuple, _Buffer] = {}
        self._results: dict[tuple, Tensor] = {}
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

    def buffer(self, what: str, place: int, like: Tensor) -> _Buffer:
        """The buffer for a tensor: all blocks that have one alike in this place share it."""
        key = (what, place, _meta(like))
        if key not in self._buffers:
            self._buffers[key] = _Buffer(like)
        return self._buffers[key]

    def forget(self) -> None:
        """Copy everything anew from now on: another forward may find other values in the tensors of the one before,
        without a version that tells."""
        for buffer in self._buffers.values():
            buffer.forget()

    def result(self, what: str, place: int, like: Tensor) -> Tensor:
        """What graphs write a result to: as `buffer`."""
        key = (what, place, _meta(like))
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


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]
