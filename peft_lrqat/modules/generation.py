"""Dense weights that layers keep while their model generates.

A layer builds its weight W^ from packed codes for every product, and drops it. With thousands of tokens in a batch that
costs little beside the product; a decoding step multiplies W^ with one token a sequence, and building it costs several
times as much as everything else. So while a model generates, each layer builds W^ once, in the dtype that it is used
in, and keeps it. The numbers are the same: the same function builds it, and the same product uses it.

**When.** For the time of a call of `generate` or `generate_batch`. PEFT, TRL and pipelines all end at these two methods
of transformers, which are wrapped once, for all models (`keep_in_generate`): the wrapper finds the layers of this
package, and takes back what they kept when the call returns or raises. Nothing else tells where generating ends: a
layer that guessed from the batches that it sees would hold memory until the next training step, or for ever in a
process that never trains. No model and no layer has anything of this on it (`_SLOTS` knows the layers), so no copy,
pickle, file or state dict ever holds a kept weight. A decoding loop of your own says `with kept_weights(model):`.

**When not.** Where gradients are wanted; inside torch.compile, which would fix the weight in its graph, and while a
CUDA graph is captured; for layers whose tensors FSDP, DeepSpeed or accelerate put in place for a layer's turn only.
There W^ is built as always.

**Never stale.** A kept weight remembers the tensors that it was made of, by identity, address and version, which counts
writes in place; every use compares them. Another adapter, strength or dtype is another key. A fused optimizer is not
counted, so the step of any optimizer drops everything, and so does, for its layer, a forward that wants gradients.
Nothing sees writes through `.data` in the middle of a call: use `torch.no_grad()` and write to the tensor itself.

**How much.** 2 or 4 bytes a weight, up to a limit (`limit_kept_weights`). A layer that finds no room builds its weight
for every product, as always. So do all layers once the device has run out of memory while one was built.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

#: transformers' entries to generation.
_ENTRIES = ("generate", "generate_batch")

_limit: int | None = None
_held: Counter[torch.device] = Counter()  # bytes of kept weights
_lock = threading.RLock()


class _Kept(NamedTuple):
    value: Any
    sources: tuple[Tensor | None, ...]  # holding them keeps their identities from being used again
    state: list[tuple[int, int | None] | None]  # address and version of each
    device: torch.device
    size: int  # bytes

    def made_of(self, sources: Sequence[Tensor | None]) -> bool:
        """Whether it is these very tensors, unchanged. Every product asks, so it takes little Python."""
        for now, then, state in zip(sources, self.sources, self.state, strict=True):
            if now is not then or (now is not None and (now.data_ptr(), now._version) != state):
                return False
        return True


class _Generation:
    """One model that generates, maybe in several threads."""

    def __init__(self, model: nn.Module) -> None:
        self.callers = 0
        self.allowed: dict[torch.device, int] = {}
        self.slots = {
            layer: Slot(self, layer.out_features * layer.in_features)
            for layer in model.modules()
            # one that generates as part of another model already stays with that
            if isinstance(layer, KeepsWeight) and layer not in _SLOTS and _stays_here(layer)
        }

    def has_room(self, device: torch.device, size: int) -> bool:
        if device not in self.allowed:
            self.allowed[device] = _held[device] + _free(device) // 2 if _limit is None else _limit
        # a thread may come here after the call has ended
        return self.callers > 0 and _held[device] + size <= self.allowed[device]

    def give_up(self, device: torch.device) -> None:
        """Drop all, and keep no more on this device."""
        self.allowed[device] = 0
        for slot in self.slots.values():
            slot.clear()


class Slot:
    """What one layer keeps: one weight for each set of adapters and each dtype that it is called with."""

    __slots__ = ("_generation", "_kept", "_numel")

    def __init__(self, generation: _Generation, numel: int) -> None:
        self._generation, self._numel = generation, numel
        self._kept: dict[Hashable, _Kept] = {}

    def get(
        self, dtype: torch.dtype, sources: Sequence[Tensor | None], build: Callable[[], Any], key: Hashable = None
    ) -> Any:
        """Return what `build` made, now or before, or None where it may not be kept.

        Args:
            dtype: of the weight.
            sources: the tensors that it is made of. They live on its device; the first is not None.
            build: makes the weight, and what else the product wants.
            key: what else it depends on.
        """
        device: torch.device = sources[0].device  # type: ignore[union-attr]  # the first is never None
        stream = None
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return None
            stream = torch._C._cuda_getCurrentRawStream(device.index)  # another one would not wait for the weight
        key = dtype, key, stream
        kept = self._kept.get(key)
        if kept is not None and kept.made_of(sources):
            return kept.value
        state = [None if t is None else (t.data_ptr(), _version(t)) for t in sources]
        size = self._numel * dtype.itemsize
        with _lock:
            self._drop(key)
            if not self._generation.has_room(device, size) or any(known and known[1] is None for known in state):
                return None
            try:
                value = build()
            except torch.OutOfMemoryError:
                self._generation.give_up(device)
                return None
            self._kept[key] = _Kept(value, tuple(sources), state, device, size)
            _held[device] += size
        return value

    def _drop(self, key: Hashable) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            _held[kept.device] -= kept.size

    def clear(self) -> None:
        """Drop all."""
        if self._kept:
            with _lock:
                for key in list(self._kept):
                    self._drop(key)


class KeepsWeight:
    """A layer that builds its weight for every product, unless it may keep it."""

    in_features: Any
    out_features: Any

    def slot(self) -> Slot | None:
        """Where the layer may keep its weight now; nearly always None."""
        if torch.compiler.is_compiling() or not _SLOTS:
            return None
        slot = _SLOTS.get(self)
        if slot is not None and torch.is_grad_enabled():
            slot.clear()
            return None
        return slot


def _drop_all(*args: Any) -> None:
    """After the step of any optimizer."""
    with _lock:
        for slot in _SLOTS.values():
            slot.clear()


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_drop_all)  # torch does not like hooks that come and go between steps


# of the layers, and models, that generate just now
_SLOTS: dict[Any, Slot] = {}
_GENERATIONS: dict[nn.Module, _Generation] = {}


def _version(tensor: Tensor) -> int | None:
    """How often the tensor was written to; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _stays_here(module: Any) -> bool:
    """Whether the layer's tensors are its own, whole, and there between two calls."""
    if getattr(module, "_is_fsdp_managed_module", False):
        return False
    tensors = (*module.parameters(), *module.buffers())
    # offloaded by accelerate, sharded by FSDP, partitioned by DeepSpeed
    return not any(t.is_meta or hasattr(t, "device_mesh") or hasattr(t, "ds_id") for t in tensors)


def _free(device: torch.device) -> int:
    """Bytes that are free on the device, counting what torch holds for it unused."""
    backend = torch.get_device_module(device)
    if hasattr(backend, "mem_get_info"):
        unused = backend.memory_reserved(device) - backend.memory_allocated(device)
        return backend.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")  # a container's own limit
    with contextlib.suppress(OSError, ValueError):
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(free, 0)


def limit_kept_weights(limit: int | None) -> None:
    """Limit how many bytes of dense weights the layers of this process may keep while a model generates.

    A quantized layer that keeps its dense weight need not build it again for every token. The numbers are the same.

    Args:
        limit (int | None): bytes a device, in this process. 0: none, so every decoding step builds its weights. None,
            the default: half of what is free on the device when the call of `generate` begins to keep them.

    Raises:
        ValueError: `limit` is negative, or no integer.

    Examples:
        >>> from peft_lrqat import limit_kept_weights
        >>> limit_kept_weights(2 * 1024**3)
        >>> tokens = model.generate(**tokenizer("The quick", return_tensors="pt"), max_new_tokens=4)
        >>> limit_kept_weights(None)
    """
    global _limit
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
        raise ValueError(f"`limit` is {limit!r}; allowed are None and whole numbers of bytes from 0.")
    _limit = limit


@contextlib.contextmanager
def kept_weights(model: nn.Module) -> Iterator[None]:
    """Let the quantized layers of a model keep their dense weights inside a `with` block, for a decoding loop of your
    own.

    `model.generate` does so by itself. At the end of the block they are dropped. `limit_kept_weights` has the limit.

    Args:
        model (nn.Module): a model with layers of this package, adapted or merged. Other layers are left alone.

    Returns:
        A context manager, without a value.

    Raises:
        ValueError: `model` is no module.

    Examples:
        >>> import torch
        >>> from peft_lrqat import kept_weights
        >>> tokens = tokenizer("The quick", return_tensors="pt")["input_ids"]
        >>> with torch.no_grad(), kept_weights(model):
        ...     for _ in range(4):
        ...         best = model(input_ids=tokens).logits[:, -1:].argmax(-1)
        ...         tokens = torch.cat([tokens, best], dim=1)
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` is {model!r:.80}; it must be a model, an `nn.Module`. Load it first.")
    _watch_optimizers()
    with _lock:
        generation = _GENERATIONS.get(model)
        if generation is None:
            generation = _GENERATIONS[model] = _Generation(model)
            _SLOTS.update(generation.slots)
        generation.callers += 1
    try:
        yield
    finally:
        with _lock:
            generation.callers -= 1
            if not generation.callers:
                del _GENERATIONS[model]
                for layer, slot in generation.slots.items():
                    _SLOTS.pop(layer, None)
                    slot.clear()


def _keeping(entry: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(entry)
    def keeping(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with kept_weights(self):
            return entry(self, *args, **kwargs)

    keeping.keeps_weights = True  # type: ignore[attr-defined]  # how a second call of `keep_in_generate` knows
    return keeping


def keep_in_generate() -> None:
    """Have every model of transformers generate inside of `kept_weights`; a second call does nothing."""
    from transformers import GenerationMixin

    for name in _ENTRIES:
        entry = getattr(GenerationMixin, name, None)  # older versions have no generate_batch
        if entry is not None and not hasattr(entry, "keeps_weights"):
            setattr(GenerationMixin, name, _keeping(entry))
