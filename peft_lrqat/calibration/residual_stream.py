"""What of a decoder reads the residual stream and what writes to it: where a rotation is fused, or why it cannot be.

It is found by structure and by names, those of Llama and of the many models after it: a backbone of `embed_tokens`,
`layers` and `norm` with a head behind it; layers of `self_attn` and `mlp`, each behind a norm (`input_layernorm`,
`post_attention_layernorm`), whose gain is applied to what is normalized. Every parameter must have a place in this
table, or the model is refused by that parameter's name; and every norm is tried on numbers, whether it divides by the
root mean square and does nothing else. What a model does between its parameters is checked by `rotation.py`.

With Q the rotation of the stream (R1), g a norm's gain and R the rotation of a head's values (R2); W is (out, in):

    embedding (tokens, width)                 E Q
    reads the stream behind a norm of gain g  W diag(g) Q           bias: the same
    writes to the stream                      Q^T W                 bias: b Q
    norm                                      gain 1
    values: also, per head                    R^T W                 bias: b R
    reads what attention gives: per head      W R
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from .hadamard import Rotation

# A block's parameters by the rest of their names. Experts are in a list, or stacked as one parameter (experts, ., .).
_EXPERT = r"(experts\.(\d+\.)?|shared_experts?\.)?"
_READ_BY_ATTENTION = re.compile(r"self_attn\.(q|k|v|qkv)_proj\.weight")
_READ_BY_MLP = re.compile(
    rf"mlp\.({_EXPERT}(gate|up|gate_up)_proj(\.weight)?|(gate|router|shared_expert_gate)\.weight)"
)
_WRITES = re.compile(rf"(self_attn\.o_proj|mlp\.{_EXPERT}down_proj)(\.weight|\.bias|_bias)?")
_INSIDE_ATTENTION = re.compile(r"self_attn\.(((q|k|v|qkv)_proj\.bias)|([qk]_norm|(query|key)_layernorm)\.weight|sinks)")
_INSIDE_MLP = re.compile(
    rf"mlp\.({_EXPERT}(gate|up|gate_up)_proj(\.|_)bias|(gate|router)\.(bias|e_score_correction_bias))"
)
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEADS = ("lm_head", "score")
_POST_NORMS = (
    "Each block must read the stream through one norm before attention and one before the MLP. Where what it adds is "
    "normalized too (Gemma 2 and 3, OLMo 2), that norm's gain fits into no weight"
)


class Turn(NamedTuple):
    """A rotation along one axis of a parameter, from entry `start` on."""

    rotation: Rotation
    axis: int
    start: int = 0


@dataclass
class Change:
    """What becomes of one parameter.

    Attributes:
        owner, key: the module that holds it, and its name there.
        name: its name in the model.
        gain: fp64 (width,), multiplied along `gain_axis` first; None: 1.
        turns: then rotations, one after the other.
        fill: the number that all entries become instead; None: there is none.
    """

    owner: nn.Module
    key: str
    name: str
    gain: torch.Tensor | None = None
    gain_axis: int = -1
    turns: list[Turn] = field(default_factory=list)
    fill: float | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now."""
        return self.owner._parameters[self.key]  # type: ignore[return-value]  # `None` is nobody's change

    def by_rows(self) -> bool:
        """Whether rows change on their own, so that some of them can be computed at a time."""
        return self.gain_axis == -1 and all(turn.axis == -1 for turn in self.turns)

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The new values of the parameter, or of some rows of it, fp64 on their device."""
        new = values.to(torch.float64, copy=True)
        if self.fill is not None:
            return new.fill_(self.fill)
        if self.gain is not None:
            new.movedim(self.gain_axis, -1).mul_(self.gain.to(new.device))
        for rotation, axis, start in self.turns:
            part = new.narrow(axis, start, new.shape[axis] - start)
            part.copy_(rotation(part, axis))
        return new


class Unit(NamedTuple):
    """A part of the model that runs on its own: the embedding, a block, the last norm, the head.

    Attributes:
        changes: of its parameters.
        turned: the rotation of what it returns; None: that stays what it was.
        compared: whether that is known (behind the last norm, the gain is another as well).
    """

    name: str
    module: nn.Module
    changes: list[Change]
    turned: Rotation | None = None
    compared: bool = True


def units(model: Any, *, residual: bool, values: bool, generator: torch.Generator) -> list[Unit]:
    """All units in the order in which they run, with what the rotations make of them.

    Args:
        residual: rotate the residual stream (R1).
        values: rotate the values of every head (R2), one rotation a block.

    Raises:
        ValueError: this model cannot be rotated; the message says why. Nothing is changed here in any case.
    """
    backbone = model.base_model
    embedding: Any = getattr(backbone, "embed_tokens", None)
    blocks: Any = getattr(backbone, "layers", None)
    norm: Any = getattr(backbone, "norm", None)
    heads = [name for name in _HEADS if isinstance(getattr(model, name, None), nn.Linear)]
    if not isinstance(embedding, nn.Embedding) or not isinstance(blocks, nn.ModuleList) or norm is None or not heads:
        raise ValueError(
            f"Rotations are known for decoders that are built as Llama is: `embed_tokens`, `layers` and `norm`, with "
            f"`{'` or `'.join(_HEADS)}` behind. {type(model).__name__} is not, so nothing was changed."
        )
    inside = next(name for name, module in model.named_modules() if module is backbone) + "."
    stream = Rotation(embedding.embedding_dim, generator) if residual else None
    first = Unit(f"{inside}embed_tokens", embedding, [], stream)
    last = Unit(f"{inside}norm", norm, [], compared=stream is None)
    head = Unit(heads[0], getattr(model, heads[0]), [])
    if stream is not None:
        turns = [Turn(stream, -1)]
        gain, offset = norm_gain(norm, last.name)
        first.changes.append(Change(embedding, "weight", f"{first.name}.weight", turns=turns))
        last.changes.append(Change(norm, "weight", f"{last.name}.weight", fill=1 - offset))
        head.changes.append(Change(head.module, "weight", f"{head.name}.weight", gain, turns=turns))
    middle = [
        Unit(name, block, _block(name, block, model, stream, values, generator), stream)
        for name, block in ((f"{inside}layers.{index}", block) for index, block in enumerate(blocks))
    ]
    found = [first, *middle, last, head]
    if stream is not None:
        _check_all_known(model, found)
    _check_unshared(model, found)
    return found


def _block(
    name: str, block: nn.Module, model: Any, stream: Rotation | None, values: bool, generator: torch.Generator
) -> list[Change]:
    """The changes of one block."""
    changes: dict[str, Change] = {}

    def change(path: str) -> Change:
        owner, _, key = path.rpartition(".")
        return changes.setdefault(path, Change(block.get_submodule(owner), key, f"{name}.{path}"))

    if stream is not None:
        _turn_stream(name, block, stream, change)
    if values:
        _turn_values(f"{name}.self_attn", getattr(block, "self_attn", None), model.config, change, generator)
    return list(changes.values())


def _turn_stream(name: str, block: nn.Module, stream: Rotation, change: Callable[[str], Change]) -> None:
    gains = []
    for key in _NORMS:
        if not hasattr(block, key):
            raise _refusal(f"{name} ({type(block).__name__}) has no {key!r}. {_POST_NORMS}")
        gain, offset = norm_gain(getattr(block, key), f"{name}.{key}")
        gains.append(gain)
        change(f"{key}.weight").fill = 1 - offset
    for path, parameter in block.named_parameters(remove_duplicate=False):
        in_attention = _READ_BY_ATTENTION.fullmatch(path)
        reads = in_attention or _READ_BY_MLP.fullmatch(path)
        if not reads and not _WRITES.fullmatch(path):
            inside = _INSIDE_ATTENTION.fullmatch(path) or _INSIDE_MLP.fullmatch(path)
            if not inside and path not in [f"{key}.weight" for key in _NORMS]:
                raise _refusal(_unknown(f"{name}.{path}"))
            continue
        # nn.Linear's and most stacked experts' weights are (..., out, in), others say so; a bias is (..., out)
        last_is_in = parameter.ndim < 3 or not getattr(_owner(block, path), "is_transposed", False)
        axis = -1 if path.endswith("bias") or bool(reads) == last_is_in else -2
        one = change(path)
        one.turns.append(Turn(stream, axis))
        if reads:
            one.gain, one.gain_axis = gains[0 if in_attention else 1], axis
        if parameter.ndim < -axis or parameter.shape[axis] != stream.size:
            raise _refusal(f"{name}.{path} is {tuple(parameter.shape)}, but the stream has {stream.size} channels")


def _owner(block: nn.Module, path: str) -> nn.Module:
    return block.get_submodule(path.rpartition(".")[0])


def _turn_values(
    name: str, attention: Any, config: Any, change: Callable[[str], Change], generator: torch.Generator
) -> None:
    remedy = "`values=False` leaves the values as they are"
    paths = [] if attention is None else [path for path, _ in attention.named_parameters()]
    source = "qkv_proj" if "qkv_proj.weight" in paths else "v_proj"
    known = (_READ_BY_ATTENTION, _INSIDE_ATTENTION, _WRITES)
    for path in paths:
        if not any(one.fullmatch(f"self_attn.{path}") for one in known):
            raise _refusal(f"what '{name}.{path}' does with the values is not known", remedy)
    if not {f"{source}.weight", "o_proj.weight"} <= set(paths):
        raise _refusal(f"{name} has no `v_proj` (or `qkv_proj`) and `o_proj`", remedy)
    if getattr(config, "clip_qkv", None) is not None:
        raise _refusal("each entry of the values is clipped (`clip_qkv`)", remedy)
    size = getattr(attention, "head_dim", 0)
    rows, inputs = getattr(attention, source).out_features, attention.o_proj.in_features
    width = rows if source == "v_proj" else config.num_key_value_heads * size  # the last of q, k, v
    if not size or width > rows or width % size or inputs % size:
        raise _refusal(
            f"{name} has heads of {size}, but {rows} rows of {source} and {inputs} of o_proj's inputs", remedy
        )
    rotation = Rotation(size, generator)
    change(f"self_attn.{source}.weight").turns.append(Turn(rotation, -2, rows - width))
    if f"{source}.bias" in paths:
        change(f"self_attn.{source}.bias").turns.append(Turn(rotation, -1, rows - width))
    change("self_attn.o_proj.weight").turns.append(Turn(rotation, -1))


def norm_gain(norm: Any, where: str) -> tuple[torch.Tensor, int]:
    """The gain of a norm, fp64 (width,), and what is added to its weight to get it (0; Gemma: 1).

    Raises:
        ValueError: on random numbers it does something else than divide by the root mean square and multiply.
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        raise _refusal(f"{where} ({type(norm).__name__}) has no `weight` of one gain a channel")
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device) + 0.5
    y = copy.deepcopy(norm).float()(x).double()  # torch's LayerNorm takes inputs of its own dtype only
    normalized = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    for offset in (0, 1):
        gain = weight.detach().double() + offset
        if (y - gain * normalized).norm() <= 1e-3 * y.norm():
            return gain, offset
    raise _refusal(
        f"{where} ({type(norm).__name__}) is no RMSNorm, which divides by the root mean square and multiplies. A "
        "LayerNorm subtracts the mean, which depends on the basis"
    )


def tied(found: list[Unit]) -> bool:
    """Whether the head's weight is the embedding's."""
    return found[-1].module.weight is found[0].module.weight


def _check_all_known(model: nn.Module, found: list[Unit]) -> None:
    """Raise ValueError if a parameter is outside of all units."""
    inside = {id(parameter) for unit in found for parameter in unit.module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside:
            raise _refusal(_unknown(name))


def _check_unshared(model: nn.Module, found: list[Unit]) -> None:
    """Raise ValueError if a parameter that changes is shared with another module. Only the head may share the
    embedding's.
    """
    slots = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for change in (change for unit in found for change in unit.changes):
        may_share = tied(found) and change.owner in (found[0].module, found[-1].module)
        if slots[id(change.parameter)] > 1 + may_share:
            raise _refusal(f"{change.name!r} is shared by several modules, and each would change it")


def _unknown(name: str) -> str:
    return f"what {name!r} does with the residual stream is not known" + (f". {_POST_NORMS}" if "norm" in name else "")


def _refusal(what: str, remedy: str = "`residual=False` rotates the values alone") -> ValueError:
    return ValueError(f"This model cannot be rotated: {what}. Nothing was changed. {remedy}.")


def changes_of(found: list[Unit]) -> Iterator[Change]:
    """All changes, the head's first: while the embedding that it may share is as it was."""
    for unit in reversed(found):
        yield from unit.changes
