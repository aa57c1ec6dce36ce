"""One block as two CUDA graphs: recording them, the buffers that they read and write, and replaying them.

`block_graphs.py` says what this is for, and decides when a block is recorded.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.dispatch import refuse_second_derivatives
from ..ops.narrow_gradient import Lender, NarrowGradient
from .block_state import BlockState, in_parts, stand_in

_CHANGED = (
    "A trained weight, an adapter or a scale was changed in place between forward and backward (an optimizer step, a "
    "load, a merge). Run forward again."
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


class Buffer:
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


def meta(tensor: Tensor) -> tuple:
    """What a buffer has to have in common with a tensor."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


# -- the arguments of a block


class Unfit(Exception):
    """A call that cannot be a graph; the message is a clause that says why."""


class _Tensor:
    """Stands for a tensor in the layout of arguments."""


def flatten(value: Any, tensors: list[Tensor], layout: list[Any], verb: str = "is given") -> None:
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
            flatten(one, tensors, layout, verb)
    elif type(value) is dict:
        layout.append((dict, tuple(value)))
        for one in value.values():
            flatten(one, tensors, layout, verb)
    else:
        raise Unfit(f"it {verb} a {type(value).__name__}")


def rebuild(layout: Iterator[Any], tensors: Iterator[Tensor]) -> Any:
    """Undo `flatten`."""
    found = next(layout)
    if found is _Tensor:
        return next(tensors)
    kind, value = found
    if kind in (tuple, list):
        return kind(rebuild(layout, tensors) for _ in range(value))
    if kind is dict:
        return {key: rebuild(layout, tensors) for key in value}
    return value


# -- graphs


class Owner(Protocol):
    """What the graphs of all blocks share."""

    recorder: Any
    lender: Lender

    def buffer(self, what: str, place: int, like: Tensor) -> Buffer: ...

    def result(self, what: str, place: int, like: Tensor) -> Tensor: ...


class BlockGraph:
    """The two graphs of a block for inputs of some shapes."""

    def __init__(self, owner: Owner, state: BlockState, function: Callable[..., Any], inputs: list[Tensor]):
        """Run the block once on the buffers, and record it.

        Args:
            function: the block, as a function of tensors.
            inputs: those of this call.

        Raises:
            Unfit: it cannot be a graph.
        """
        self.state, self._owner, self._function = state, owner, function
        self._needed = [i for i, t in enumerate(inputs) if t.requires_grad]
        # The gradients of low-bit weights, of which no two are to be held by what a backward needs for itself.
        self._grads: dict[int, Tensor] = {}
        self._weights = [i for i, p in enumerate(state.parameters, len(self._needed)) if in_parts(p)]
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
        trained: list[Any] = [stand_in(p) for p in self.state.parameters]
        leaves = [*(inputs[i].requires_grad_() for i in self._needed), *trained]
        for i in self._weights:
            weight = trained[i - len(self._needed)]
            weight.register_hook(functools.partial(self._put_away, i))
            if i in self._grads:
                weight.gradient_places = [self._grads[i]]  # which spares the copy
        outputs: list[Tensor] = []
        layout: list[Any] = []
        # Whoever moves saved tensors elsewhere is not to move those of a graph. What is kept must not know the node
        # that keeps it: such a circle, through C++, is never freed.
        hooks = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda t: t)
        with torch.enable_grad(), self._autocast(), hooks, self.state.with_parameters(trained):
            flatten(self._function(*inputs), outputs, layout, "returns")
        return outputs, layout, leaves

    def _put_away(self, place: int, grad: Tensor) -> Tensor:
        """Copy a weight's gradient as soon as it is there, and return one that lies where it was copied to."""
        values = _held(grad)
        there = self._owner.result("gradient", place, values)
        if values is not there:
            there.copy_(values)
        return there if values is grad else NarrowGradient(there)

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
        self._owner.lender.take_back()
        try:
            with recorder.no_waiting():
                grads = self._run_both()
            if not (torch.equal(drawn, recorder.draws()) and torch.equal(drawn_here, torch.get_rng_state())):
                raise Unfit("it draws random numbers, and the recomputation would draw others (set dropout to 0)")
        except BaseException as error:
            recorder.undraw(drawn)
            torch.set_rng_state(drawn_here)
            if isinstance(error, RuntimeError) and "synchroniz" in str(error):
                raise Unfit(
                    "it waits for the GPU, as mixtures of experts do to count tokens, and other code to look at values "
                    f"({first_line(error)})"
                ) from error
            raise
        if [buffer.tensor._version for buffer in self.inputs] != before or not self._holds(inputs):
            raise Unfit("it writes to its input")
        self._grads = {i: self._owner.result("gradient", i, _held(g)) for i, g in enumerate(grads) if g is not None}
        self._others = [i for i in self._grads if i not in self._weights]

    def _run_both(self) -> list[Tensor | None]:
        """The gradients of a first run, of zeros that arrive."""
        outputs, self.layout, leaves = self._run()
        if self.layout[0] is not _Tensor and self.layout[0][0] is not tuple:
            raise Unfit(f"it returns a {self.layout[0][0].__name__}")
        self.differentiable = [i for i, t in enumerate(outputs) if t.requires_grad]
        if not self.differentiable:
            raise Unfit("nothing that it returns depends on anything that is trained")
        self.outputs = [self._owner.result("output", i, t) for i, t in enumerate(outputs)]
        self.arriving = [self._owner.buffer("arriving", i, self.outputs[i]) for i in self.differentiable]
        with torch.no_grad():
            for buffer in self.arriving:
                buffer.tensor.zero_()
                buffer.forget()
        count = len(leaves)
        grads = self._gradients(outputs, [*leaves, *self.state.parameters])
        if any(grad is not None for grad in grads[count:]):
            raise Unfit("it uses a parameter that it has not only registered, but keeps elsewhere too")
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
            # which of them are None was seen in the first run
            _copy([g for i in self._others if (g := grads[i]) is not None], [self._grads[i] for i in self._others])

    def _load(self, inputs: list[Tensor]) -> None:
        for buffer, tensor in zip(self.inputs, inputs, strict=True):
            buffer.take(tensor)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """The block's outputs: new tensors."""
        self._load(inputs)
        self._replay_forward()
        return _copies(self.outputs)

    def _is_lent(self, weight: Any, place: int) -> bool:
        """Whether an optimizer takes a weight's gradient when it arrives, or it has to look wider than it is."""
        return weight.taken_at_once or self._grads[place].dtype != weight.dtype

    def backward(self, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor | None]:
        """Gradients of the inputs that need one, and of the parameters: nobody else's tensors, or None where there is
        none."""
        self._load(inputs)
        for buffer, i in zip(self.arriving, self.differentiable, strict=True):
            buffer.forget()  # a kernel may write to what arrives
            buffer.take(grads[i])
        self._owner.lender.take_back()
        self._replay_backward()
        count = len(self._needed)
        found: list[Tensor | None] = [None] * (count + len(self.state.parameters))
        lent = [i for i in self._weights if i in self._grads and self._is_lent(self.state.parameters[i - count], i)]
        for i in lent:
            found[i] = self._owner.lender.lend(self._grads[i])
        copied = [i for i in self._grads if i not in lent]
        for i, copy in zip(copied, _copies([self._grads[i] for i in copied]), strict=True):
            found[i] = copy
        of_inputs: list[Tensor | None] = [None] * len(inputs)
        for i, grad in zip(self._needed, found, strict=False):
            of_inputs[i] = grad
        return [*of_inputs, *found[count:]]


def _held(grad: Tensor) -> Tensor:
    """A gradient as it lies in memory."""
    return grad.held if isinstance(grad, NarrowGradient) else grad


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(t) for t in tensors]
    _copy(tensors, copies)
    return copies


def _copy(tensors: list[Tensor], there: list[Tensor]) -> None:
    if tensors:
        torch._foreach_copy_(there, tensors)


class Replay(torch.autograd.Function):
    """A block: inputs and parameters to outputs."""

    @staticmethod
    def forward(ctx: Any, graph: BlockGraph, count: int, *tensors: Tensor) -> Any:
        inputs = tensors[:count]
        outputs = graph.forward(list(inputs))
        ctx.graph, ctx.versions = graph, graph.state.versions()
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(*(t for i, t in enumerate(outputs) if i not in graph.differentiable))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("blocks that are replayed as CUDA graphs do not have", "without CUDA graphs")
        if ctx.versions != ctx.graph.state.versions():
            raise RuntimeError(_CHANGED)
        return None, None, *ctx.graph.backward(list(ctx.saved_tensors), list(grads))


def first_line(error: BaseException) -> str:
    """What an error says first, for a warning."""
    return str(error).strip().partition("\n")[0][:300]
