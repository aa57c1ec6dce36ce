"""What the layers of a model receive on calibration text: one decoder block at a time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from ..modules.experts import Experts, ExpertStack
from ..modules.packed import MERGED
from ..tuners.common.config import GridConfig
from ..tuners.common.frozen import FrozenWeight
from ..tuners.common.plain import is_offloaded
from ..tuners.common.rules import WHOLE, check_value
from ..tuners.lowbit_sr import LowBitSRConfig, LowBitSRModel
from ..tuners.lrqat import LRQATConfig, LRQATModel

#: What says how to quantize.
AnyConfig = LRQATConfig | LowBitSRConfig


class _EnoughError(Exception):
    """Ends a forward whose rest is not needed."""


class BlockInputs:
    """What the decoder blocks receive, for every calibration batch.

    To learn that, the model is run without its blocks: what they receive with the hidden states does not depend on
    these. One block of each class runs, once, to see what its kind returns.

    Attributes:
        hidden: one tensor (batch, length, width) a batch: the input of the block that is next.
        calls: for each batch, for each block, its other arguments (masks, rotary tables), which do not depend on
            `hidden`; equal tensors are shared, so they take little memory.
        masks: bool (batch, length) or None a batch: which tokens count.
        device: where the blocks compute.
    """

    device: torch.device

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        batches: Iterable[Mapping[str, torch.Tensor]],
        keep_on: torch.device | str | None = None,
    ) -> None:
        """
        Args:
            keep_on: where `hidden` is kept; None: where the blocks compute.
        """
        self.keep_on = keep_on
        self.hidden: list[torch.Tensor] = []
        self.calls: list[list[tuple[tuple, dict[str, Any]]]] = []
        self.masks: list[torch.Tensor | None] = []
        self._skips: dict[type, Callable | None] = {}
        for batch in batches:
            self._record(model, blocks, batch)

    def _record(self, model: nn.Module, blocks: nn.ModuleList, batch: Mapping[str, torch.Tensor]) -> None:
        calls: list[tuple[tuple, dict[str, Any]]] = []

        def recorder(block: nn.Module) -> Callable:
            forward = block.forward

            def record(*args: Any, **kwargs: Any) -> Any:
                others = dict(kwargs)
                hidden = args[0] if args else others.pop("hidden_states")
                if not calls:
                    self.device = hidden.device
                    self.hidden.append(self._keep(hidden))
                calls.append((args[1:], others))
                if block is blocks[-1]:
                    raise _EnoughError
                if type(block) not in self._skips:
                    out = forward(*args, **kwargs)
                    self._skips[type(block)] = _skip(out, hidden)
                    return out
                skip = self._skips[type(block)]
                return forward(*args, **kwargs) if skip is None else skip(hidden)

            return record

        own = [(block, vars(block).get("forward")) for block in blocks]
        try:
            for block in blocks:
                block.forward = recorder(block)
            with contextlib.suppress(_EnoughError):
                model(**batch, use_cache=False)
        finally:
            for block, forward in own:
                if forward is not None:
                    block.forward = forward
                else:
                    vars(block).pop("forward", None)
        self.calls.append(calls)
        mask = batch.get("attention_mask")
        self.masks.append(None if mask is None or bool(mask.all()) else mask.bool())

    def advance(self, index: int, block: nn.Module, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Replace `hidden` by the outputs of block number `index`.

        Args:
            weights: see `run_one`.
        """
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self._keep(self.run_one(index, block, batch, weights))

    def fork(self) -> BlockInputs:
        """The same calls, with hidden states that go their own way.

        So do the dictionaries in which blocks leave keys and values for later ones (Gemma 3n, Gemma 4).
        """
        other = copy.copy(self)
        copies: dict[int, Any] = {}

        def own(value: Any) -> Any:
            if not isinstance(value, MutableMapping):
                return value
            return copies.setdefault(id(value), copy.copy(value))

        other.hidden = list(self.hidden)
        other.calls = [
            [(tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()}) for args, kwargs in calls]
            for calls in self.calls
        ]
        return other

    def _keep(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.keep_on is None else hidden.to(self.keep_on)

    def run_one(
        self, index: int, block: nn.Module, batch: int, weights: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The output for one batch.

        Args:
            weights: parameters of the block, by their names in it, that stand in for its own.
        """
        args, kwargs = self.calls[batch][index]
        hidden = self.hidden[batch]
        args = (hidden if self.keep_on is None else hidden.to(self.device), *args)
        out = block(*args, **kwargs) if weights is None else functional_call(block, dict(weights), args, kwargs)
        return out[0] if isinstance(out, tuple) else out


def _skip(out: Any, hidden: torch.Tensor) -> Callable | None:
    """A function of hidden states that returns what a block returns if it leaves them unchanged.

    None: there is none, because the block returned more than hidden states, which may matter to the blocks behind it.
    """
    first, *others = out if isinstance(out, tuple) and out else (out,)
    if not isinstance(first, torch.Tensor) or (first.shape, first.dtype) != (hidden.shape, hidden.dtype):
        return None
    if any(other is not None for other in others):
        return None
    return (lambda hidden: (hidden, *others)) if isinstance(out, tuple) else (lambda hidden: hidden)


class _Hessians:
    """Hooks that add up x^T x. Layers that receive the same tensor (query, key, value) share one sum.

    Those of experts have one sum an expert, of the tokens that the router sends it.
    """

    def __init__(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.leader: dict[str, str] = {}  # layer -> the layer that holds the sum of its input
        self.mask: torch.Tensor | None = None
        self._seen: dict[int, tuple[str, torch.Tensor]] = {}  # the tensors too: their ids are theirs while they live
        self.tokens: dict[str, torch.Tensor] = {}  # of experts: int64 (experts,), how many reached each
        self._handles = [
            layer.register_forward_pre_hook(lambda module, args, name=name: self._add(name, args[0]))
            for name, layer in layers.items()
            if not isinstance(layer, ExpertStack)
        ]
        names = {id(layer): name for name, layer in layers.items()}
        for module in block.modules():
            if isinstance(module, Experts) and any(id(stack) in names for stack in module.stacks.values()):
                called = {projection: names[id(stack)] for projection, stack in module.stacks.items()}
                self._handles.append(module.register_forward_pre_hook(partial(self._route, called)))

    def start(self, mask: torch.Tensor | None) -> None:
        """Before each batch."""
        self.mask = mask
        self._seen.clear()

    def _add(self, name: str, x: torch.Tensor) -> None:
        leader, _ = self._seen.setdefault(id(x), (name, x))
        self.leader[name] = leader
        if leader == name:
            masked = self.mask is not None and x.shape[:2] == self.mask.shape
            rows = (x[self.mask] if masked else x.reshape(-1, x.shape[-1])).float()
            before = self.sums.get(name)
            self.sums[name] = rows.t() @ rows if before is None else before.addmm_(rows.t(), rows)

    def _route(self, called: Mapping[str, str], experts: Any, args: tuple[torch.Tensor, ...]) -> None:
        if self.mask is not None and self.mask.numel() == len(args[0]):
            args = tuple(each[self.mask.flatten()] for each in args)
        if len(args[0]):
            experts.observe(lambda projection, x, ends: self._add_experts(called[projection], x, ends), *args)

    def _add_experts(self, name: str, x: torch.Tensor, ends: torch.Tensor) -> None:
        if name not in self.sums:
            self.leader[name] = name
            self.sums[name] = torch.zeros(len(ends), x.shape[1], x.shape[1], device=x.device)
            self.tokens[name] = torch.zeros(len(ends), dtype=torch.int64)
        for expert, rows in enumerate(x.float().tensor_split(ends[:-1].long().cpu())):
            self.sums[name][expert].addmm_(rows.t(), rows)
            self.tokens[name][expert] += len(rows)

    def finish(self) -> Hessians:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()
        few: set[int] = set()
        for name, tokens in self.tokens.items():
            missing = (self.sums[name].shape[-1] - tokens).clamp(min=0)
            mean = self.sums[name].sum(0) / tokens.sum()
            for expert in missing.nonzero().flatten().tolist():
                self.sums[name][expert].add_(mean, alpha=missing[expert].item())
                few.add(expert)
        return Hessians({name: self.sums[leader] for name, leader in self.leader.items()}, few)


class Hessians(NamedTuple):
    """What GPTQ goes by, of the layers of a block.

    Attributes:
        sums: the sum of x^T x over the inputs of each layer, fp32 (in, in), or (experts, in, in) of a stack of experts;
            a layer that no token reached has none. An expert that fewer tokens reached than it has inputs, which say
            nothing of some directions, has the mean token of all experts for each that is missing.
        few: the numbers of these experts.
    """

    sums: dict[str, torch.Tensor]
    few: set[int]


def collect_hessians(inputs: BlockInputs, index: int, block: nn.Module, layers: Mapping[str, nn.Module]) -> Hessians:
    """What the layers of block number `index` receive."""
    hessians = _Hessians(block, layers)
    try:
        for hidden, calls, mask in zip(inputs.hidden, inputs.calls, inputs.masks, strict=True):
            hessians.start(mask)
            args, kwargs = calls[index]
            block(hidden, *args, **kwargs)
    finally:
        found = hessians.finish()
    return found


def decoder_blocks(
    model: nn.Module, config: AnyConfig, method: str, *, loading: bool = False
) -> tuple[str, nn.ModuleList, dict[str, nn.Linear]]:
    """The name of the list of decoder blocks, that list, and the layers that `config` targets, by name.

    A projection of experts is an ExpertStack, which is not in the model.

    Args:
        method: what goes through the blocks, for messages.
        loading: the weights are not there yet, and are not judged. An offloaded model is treated alike.

    Raises:
        ValueError: the model is quantized already, the targeted layers are not all in one list, or one of them cannot
            be quantized; or the model is offloaded, and the rest of it is on several devices.
    """
    if any(isinstance(module, (*MERGED, FrozenWeight)) for module in model.modules()):
        raise ValueError(f"`model` is quantized already; {method} starts from the float model.")
    kind = LRQATModel if isinstance(config, LRQATConfig) else LowBitSRModel
    offloaded = is_offloaded(model)
    targets = kind.find_targets(model, config, loading=loading or offloaded)
    if offloaded and len(devices := _devices(model)) > 1:
        raise ValueError(
            f"`model` is offloaded in part, and the rest of it is on several devices ({', '.join(devices)}), but "
            f"{method} brings in blocks on one. Load it with a `device_map` of one device beside 'disk' (or 'cpu')."
        )
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name, blocks in lists:  # outer lists come first
        inside = {key: module for key, module in targets.items() if key.startswith(name + ".")}
        if len(inside) == len(targets) and inside:
            others = [key for key, module in inside.items() if not isinstance(module, nn.Linear)]
            if others:
                raise ValueError(
                    f"`target_modules` names {others[0]!r}, a {type(inside[others[0]]).__name__}; {method} "
                    "here is for nn.Linear. Use the ranges of LRQATConfig for it (`range_method='lp'`)."
                )
            return name, blocks, inside  # type: ignore[return-value]  # checked just now
    raise ValueError(
        f"{method} goes through the decoder blocks one by one, but the targeted modules are not all inside one list of "
        "blocks. Leave out embeddings and the output layer, for instance with `target_modules='all-linear'`."
    )


def some(numbers: Collection[int]) -> str:
    """The first of them, for messages."""
    return ", ".join(map(str, sorted(numbers)[:8])) + (" ..." if len(numbers) > 8 else "")


def _devices(model: nn.Module) -> list[str]:
    """Where accelerate's hooks have the modules of a model compute."""
    hooks = [hook for module in model.modules() if (hook := getattr(module, "_hf_hook", None)) is not None]
    return sorted({str(hook.execution_device) for hook in hooks if getattr(hook, "execution_device", None) is not None})


def check_config(config: Any) -> None:
    """Raise ValueError for what is no configuration of this package, such as a LoraConfig, or a class."""
    if not isinstance(config, GridConfig):
        raise ValueError(
            f"`config` is {config if isinstance(config, type) else type(config)}, which has no grid. Give an "
            "LRQATConfig or a LowBitSRConfig, the one of the training that follows."
        )


def each(given: Any, parameter: str) -> Iterable[Any]:
    """The batches or texts that a caller gave. One alone is one of them: iterating over it would take it apart.

    Raises:
        ValueError: it cannot be iterated over.
    """
    if isinstance(given, (str, torch.Tensor, Mapping)):
        return [given]
    if not isinstance(given, Iterable):
        raise ValueError(
            f"`{parameter}` is of type {type(given).__name__}; give a list of batches, or another iterable."
        )
    return given


def by_name(batch: Any, parameter: str) -> dict[str, Any]:
    """A batch as a model's forward takes it, by name. Token ids of one row, (length,), become (1, length).

    Raises:
        ValueError: it is neither token ids nor a mapping.
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, torch.Tensor) and batch.ndim in (1, 2) and not batch.is_floating_point():
        return {"input_ids": batch if batch.ndim == 2 else batch.unsqueeze(0)}
    found = f"a tensor of {batch.dtype} {tuple(batch.shape)}" if isinstance(batch, torch.Tensor) else repr(batch)
    raise ValueError(
        f"`{parameter}` holds {found[:80]}; it may hold token ids, int64 tensors (batch, length), and what the model's "
        "forward takes by name. A text becomes such by `tokenizer(text, return_tensors='pt')`."
    )


def read_batches(
    model: Any, calibration: Iterable[Any], tokenizer: Any, length: int
) -> Iterable[dict[str, torch.Tensor]]:
    """Make what the model takes from calibration text in any form that `preprocess_gptq` names. Raise ValueError if
    there is no text, or it is in another form.
    """
    check_value("length", length, WHOLE)
    items: list[Any] = list(each(calibration, "calibration"))
    if not items:
        raise ValueError("`calibration` is empty. Give texts and a `tokenizer`, or token ids.")
    texts = [item for item in items if isinstance(item, str)]
    if texts:
        if tokenizer is None or len(texts) < len(items):
            raise ValueError("`calibration` holds texts: give a `tokenizer`, and texts only.")
        if not callable(tokenizer):
            raise ValueError(
                f"`tokenizer` is {tokenizer!r}; it must be a tokenizer: `AutoTokenizer.from_pretrained(...)`."
            )
        items = _windows(texts, tokenizer, length)
    embeddings = model.get_input_embeddings().weight
    device = embeddings.device
    for item in items:
        batch = by_name(item, "calibration")
        if not isinstance(batch.get("input_ids"), torch.Tensor):
            raise ValueError(
                f"`calibration` holds a mapping with {sorted(batch)}; it needs `input_ids`, an int64 tensor (batch, "
                "length). Of a dataset with a column of texts, give that column and a `tokenizer`."
            )
        _check_token_ids(batch["input_ids"], len(embeddings))
        kept = {key: batch[key].to(device) for key in ("input_ids", "attention_mask") if key in batch}
        yield {key: value if value.ndim > 1 else value.unsqueeze(0) for key, value in kept.items()}


def _check_token_ids(ids: torch.Tensor, tokens: int) -> None:
    """Raise ValueError unless token ids are among those of a model, of which there are `tokens`: torch would say that
    some index is out of range, and a GPU less."""
    lowest, highest = (int(end) for end in ids.aminmax()) if ids.numel() else (0, 0)
    if lowest < 0 or highest >= tokens:
        raise ValueError(
            f"`calibration` has the token id {lowest if lowest < 0 else highest}, but the model has {tokens} tokens, "
            "from 0. Take the tokenizer of this model."
        )


def _windows(texts: Sequence[str], tokenizer: Any, length: int) -> list[torch.Tensor]:
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    if len(ids) < length:
        raise ValueError(
            f"`calibration` has {len(ids)} tokens, fewer than one window (`length={length}`). Give more text, or a "
            "smaller `length`."
        )
    return list(torch.tensor(ids[: len(ids) // length * length]).view(-1, 1, length))
