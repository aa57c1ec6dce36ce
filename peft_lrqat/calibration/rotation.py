"""`preprocess_rotation`: take the outliers out of a float model's activations without changing what it computes.

Fused rotations of QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406): R1 turns the residual stream, R2 the
values of every head. Why the outputs stay what they were, with Q orthogonal and h the stream, a row vector a token:

    an RMSNorm divides by the root mean square, which Q does not change:  n(h Q) = n(h) Q
    its gain g moves into the layers that read it:                        (n(h) g) W^T = n(h) (W diag(g))^T
    a layer that reads n(h) Q, with W diag(g) Q instead of W:             n(h) Q (W diag(g) Q)^T = (n(h) g) W^T
    a layer that writes, with Q^T W instead of W:                         x (Q^T W)^T = (x W^T) Q
    so, block by block, the stream of the rotated model is h Q, and its logits are those of before. For R2, attention
    adds up whole values of a head:                                       A (v R) = (A v) R, which o_proj reads with W R

None of this is exact in floating point, nor true of a model that does something else with its stream. So it is tried
first: the model runs on random tokens in fp32, every part once as it is and once with the weights that it would get,
and each part's outputs are compared. Weights are changed only after that, in fp64, and cast back once.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ..arguments import check_flags, with_suggestions
from ..chunks import row_chunks
from ..files import bytes_in_words
from ..modules.packed import MERGED
from ..tuners.common.frozen import FrozenWeight
from ..tuners.common.rules import INTEGER, check_value
from .modes import in_eval
from .residual_stream import Change, Unit, changes_of, tied, units

logger = logging.getLogger("peft_lrqat")

#: What `preprocess_rotation` writes to a model's configuration.
KEY = "peft_lrqat_rotations"
#: Largest relative difference of a token's outputs, in fp32. What is wrong differs by much more; rounding alone came to
#: 4e-6 in SmolLM2-135M, whose stream has tokens 180 times as large as others.
_TOLERANCE = 1e-4
_TOKENS = 16
#: Draws of random tokens. A router whose two best experts are level may choose another one after rounding.
_DRAWS = 3
_PLAIN_KERNELS = (None, "eager", "sdpa", "batched_mm", "grouped_mm")


@with_suggestions
@torch.inference_mode(False)
@torch.no_grad()
def preprocess_rotation(
    model: nn.Module,
    *,
    residual: bool = True,
    values: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
    progressbar: bool = True,
) -> None:
    """Fuse random rotations (arXiv 2404.00456, 2405.16406) into the weights of a float decoder, in place. It needs no
    data.

    The model computes what it did, but outliers are spread over all channels: in what its linear layers read, except
    for `down_proj`, and in the values of the KV cache. So `act_bits` and `kv_bits` lose less. The model stays an
    ordinary float model.

    Memory: one weight at a time in fp64 (of the embeddings, some rows), and during the trial one block in fp32.

    Args:
        model (nn.Module): a float causal language model of transformers that is built as Llama is (Llama, Mistral, Qwen
            2 and 3, Gemma, Phi-3, Granite, SmolLM, Mixtral ...), or the same with a `score` head.
        residual (bool): rotate the residual stream (R1): by a Hadamard matrix with random signs where there is one of
            this width, otherwise by a random orthogonal matrix. The gains of the norms move into the layers behind
            them. An output layer that shares the matrix of the embeddings gets its own (`config.tie_word_embeddings`
            becomes False).
        values (bool): rotate the values of every head (R2), by another such matrix in each block.
        seed (int): of the rotations.
        device (torch.device | str | None): where the new weights are computed. None: where each weight is.
        progressbar (bool): show the parts of the model go by, first in the trial and then in earnest.

    Raises:
        ValueError: the model is not one of these, is quantized, sharded or offloaded, or carries an adapter; or its
            outputs on random tokens would change, and the message names the first part whose do. Nothing was changed
            then. (An interruption later, while weights are written, leaves a model that is half rotated: load it
            again.)

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_lrqat import LRQATConfig, preprocess_rotation
        >>> preprocess_rotation(base)
        >>> base.save_pretrained("base-rotated")  # adapters belong to this base
        >>> config = LRQATConfig(bits=4, act_bits=4, act_bits_pattern={"down_proj": 8}, task_type="CAUSAL_LM")
        >>> model = get_peft_model(base, config)
    """
    _check_model(model)
    check_flags(residual=residual, values=values, progressbar=progressbar)
    check_value("seed", seed, INTEGER)
    if not residual and not values:
        raise ValueError("`residual` and `values` are both False, so there is nothing to rotate. Set one of them.")
    found = units(model, residual=residual, values=values, generator=torch.Generator().manual_seed(seed))
    changes = [change for unit in found for change in unit.changes]
    with tqdm(total=2 * len(found) + len(changes), desc="rotation", disable=not progressbar) as bar:
        _try(model, found, device, bar)
        _untie(model, found)
        for change in changes_of(found):
            _commit(change, device)
            bar.update()
    before = getattr(model.config, KEY, [])
    setattr(model.config, KEY, [*before, {"residual": residual, "values": values, "seed": seed}])


def _check_model(model: Any) -> None:
    """Raise ValueError if the weights of a model are not all there, as floats."""
    if not isinstance(model, PreTrainedModel):
        kind = "none"
        if isinstance(model, PeftModel):
            kind = "a PeftModel; rotate the base model, before `get_peft_model`"
        elif isinstance(model, (str, os.PathLike)):
            kind = "none. Load it first, with `from_pretrained`"
        raise ValueError(f"`model` must be a model of transformers; {type(model).__name__} is {kind}.")
    kinds = (*MERGED, FrozenWeight, BaseTunerLayer)
    if name := next((name for name, module in model.named_modules() if isinstance(module, kinds)), None):
        raise ValueError(
            f"{name!r} is quantized or carries an adapter; rotations are fused into the float model before."
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta or isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):  # DeepSpeed's
            raise ValueError(
                f"{name!r} is sharded, or offloaded. Rotate the whole model in one process, save it and load that."
            )
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise ValueError(f"{name!r} is {parameter.dtype}: quantized, it seems. Rotate the float model.")


def _try(model: Any, found: list[Unit], device: Any, bar: Any) -> None:
    """Raise ValueError if a part's outputs on random tokens would change."""
    table: Any = found[0].module
    routed = any("experts" in name for name, _ in model.named_modules())
    for draw in range(_DRAWS if routed else 1):
        generator = torch.Generator().manual_seed(draw)
        ids = torch.randint(table.num_embeddings, (1, _TOKENS), generator=generator).to(table.weight.device)
        before = _outputs(model, found, ids, bar, device)
        after = _outputs(model, found, ids, bar, device, rotated=True)
        errors = [_error(*outputs) for outputs in zip(found, before, after, strict=True)]
        wrong = [(unit, error) for unit, error in zip(found, errors, strict=True) if not error <= _TOLERANCE]
        if not wrong:
            return
    unit, error = wrong[0]
    raise ValueError(
        f"Rotating this model would change what it computes: {unit.name} ({type(unit.module).__name__}) is the first "
        f"part whose outputs are others, by {error:.1e} of their size, in fp32 on random tokens, so something is done "
        "with the residual stream or with the values of heads that is not known here. Nothing was changed. Try "
        "`residual=False` or `values=False`."
    )


def _error(unit: Unit, before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest relative difference of a token's outputs from what they should be."""
    if not unit.compared:
        return 0.0
    wanted = before if unit.turned is None else unit.turned(before)
    return ((after - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-30)).max().item()


def _outputs(
    model: Any, found: list[Unit], ids: torch.Tensor, bar: Any, device: Any, rotated: bool = False
) -> list[torch.Tensor]:
    """What each unit returns, fp64 (1, tokens, width), where the model computes in fp32.

    A unit has fp32 weights while it runs, and they are dropped behind it.

    Args:
        rotated: run it with the weights that it would get.
    """
    outputs: dict[int, torch.Tensor] = {}
    inside = {id(module) for unit in found for module in unit.module.modules()}
    with contextlib.ExitStack() as everything:
        for context in (_plain_arithmetic(ids.device.type), _plain_kernels(model), in_eval(model)):
            everything.enter_context(context)
        others = [module for module in model.modules() if id(module) not in inside]
        everything.enter_context(_stand_ins([(m, key, None) for m in others for key in m._parameters], device))

        def begin(unit: Unit) -> None:
            changes = {(id(change.owner), change.key): change for change in unit.changes} if rotated else {}
            own = [
                (module, key, changes.get((id(module), key)))
                for module in unit.module.modules()
                for key in module._parameters
            ]
            running.enter_context(_stand_ins(own, device))

        def end(index: int, output: Any) -> None:
            running.close()
            outputs[index] = (output[0] if isinstance(output, tuple) else output).double()
            bar.update()

        running = everything.enter_context(contextlib.ExitStack())
        for index, unit in enumerate(found):
            before = unit.module.register_forward_pre_hook(lambda *_, unit=unit: begin(unit))
            everything.callback(before.remove)
            after = unit.module.register_forward_hook(lambda module, args, output, index=index: end(index, output))
            everything.callback(after.remove)
        model(input_ids=ids, use_cache=False)
    if missed := [unit.name for index, unit in enumerate(found) if index not in outputs]:
        raise ValueError(
            f"{missed[0]} was not called when the model ran, so its place is not known. Nothing was changed."
        )
    return [outputs[index] for index in range(len(found))]


@contextlib.contextmanager
def _stand_ins(parameters: list[tuple[nn.Module, str, Change | None]], device: Any) -> Iterator[None]:
    """Give modules fp32 parameters for a while: those that they will have, where there is a change, or their own."""
    kept = []
    try:
        for owner, key, change in parameters:
            own = owner._parameters[key]
            if own is None:
                continue
            new = torch.empty_like(own, dtype=torch.float32)
            for mine, part in zip(_parts(change, own.detach()), _parts(change, new), strict=True):
                part.copy_(mine if change is None else _changed(change, mine, device))
            if own.dtype == torch.float16 and not torch.isfinite(new.half()).all():
                raise ValueError(
                    f"{change.name if change else key} would hold numbers too large for torch.float16. Nothing was "
                    "changed. Load the model in torch.bfloat16."
                )
            kept.append((owner, key, own))
            owner._parameters[key] = nn.Parameter(new, requires_grad=False)
        yield
    finally:
        for owner, key, own in kept:
            owner._parameters[key] = own


def _parts(change: Change | None, values: torch.Tensor) -> list[torch.Tensor]:
    """A parameter in parts that change on their own, experts or rows, whose fp64 copies take little memory."""
    if values.ndim == 3:
        return list(values)
    if values.ndim == 2 and (change is None or change.by_rows()):
        return [values[rows] for rows in row_chunks(values.shape[0], values.shape[1], values.device)]
    return [values]


def _changed(change: Change, values: torch.Tensor, device: Any) -> torch.Tensor:
    """New values, fp64, where they are computed."""
    # Apple's GPUs have no fp64
    return change.of(values.to(device or ("cpu" if values.device.type == "mps" else values.device)))


def _commit(change: Change, device: Any) -> None:
    """Write the new values of a parameter over the old ones."""
    values = change.parameter.detach()
    for part in _parts(change, values):
        part.copy_(_changed(change, part, device))


def _untie(model: Any, found: list[Unit]) -> None:
    """Give the head a matrix of its own: it takes the last norm's gain, which the embeddings do not."""
    head = found[-1]
    if not head.changes:
        return
    if tied(found):
        weight = head.changes[0].parameter
        head.module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        logger.info(
            "%s shared its matrix with the embeddings. They are two now, %s more, and the configuration's "
            "`tie_word_embeddings` is False. Save the model; what loads it by name (vLLM in GRPO) needs that folder.",
            head.name,
            bytes_in_words(weight.nbytes),
        )
    model.config.tie_word_embeddings = False
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    ties.pop(f"{head.name}.weight", None)


@contextlib.contextmanager
def _plain_arithmetic(kind: str) -> Iterator[None]:
    """Multiply fp32 as fp32: no autocast, no TF32, and nothing that was compiled for other weights."""
    backends: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # stubs lack it
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(kind, enabled=False), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextlib.contextmanager
def _plain_kernels(model: Any) -> Iterator[None]:
    """Attention and experts that take fp32, which flash attention and kernels for bf16 do not."""
    chosen = {kind: getattr(model.config, f"_{kind}_implementation", None) for kind in ("attn", "experts")}
    special = {kind: name for kind, name in chosen.items() if name not in _PLAIN_KERNELS}
    try:
        for kind in special:
            getattr(model, f"set_{kind}_implementation")("eager")
        yield
    finally:
        for kind, name in special.items():
            getattr(model, f"set_{kind}_implementation")(name)
