"""`preprocess_blockwise`: train the rounding of one decoder block at a time, for LR-QAT to start from.

EfficientQAT's first stage (Block-AP, arXiv 2407.11062). All weights, scales and zero points of a block are trained in
full rank (`block_weight.py`) so that the block, rounded, gives what the float block gives on calibration text. The
input of the rounded block is what the rounded blocks before it give, the target is the float model's own stream, so
errors are made up for as they come. The error of each token counts relative to the size of its target: a few tokens of
most models have hidden states a hundred times as large as all others, and behind the next norm they count no more than
those.

The experts of a mixture are trained as they are used: a token's error reaches those that the router sends it to.

What is left behind keeps the fraction of every weight: see `preprocess_blockwise`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..arguments import check_flags, check_folder, with_suggestions
from ..checkpoint.load import replace_layer
from ..formats.record import Record
from ..modules.experts import ExpertStack
from ..modules.packed import describe, merged_layer
from ..tuners.common.experts import settle_experts
from ..tuners.common.fingerprint import float_checksum, in_order
from ..tuners.common.rules import INTEGER, NOT_NEGATIVE, NUMBER, WHOLE, Rule, check_value
from ..tuners.lrqat import LRQATConfig
from .block_results import BlockResults
from .block_weight import BlockWeight, FixedPoint
from .calibrate import AnyConfig, BlockInputs, check_config, decoder_blocks, read_batches, some
from .offloaded import all_tensors, arrive, bring_in, by_block

#: Fields of a model's configuration on which no result depends.
_NO_RESULT = {"_name_or_path", "transformers_version", "use_cache"}


_RULES = {
    ("epochs", "batch"): WHOLE,
    ("learning_rate", "scale_learning_rate"): NOT_NEGATIVE,
    ("held_out",): Rule("it must be a number from 0 to below 1", lambda v: NUMBER.allows(v) and 0 <= v < 1),
    ("seed",): INTEGER,
}


@dataclass(frozen=True)
class _Settings:
    """How a block is trained."""

    epochs: int
    learning_rate: float
    scale_learning_rate: float
    held_out: float
    batch: int
    seed: int

    def __post_init__(self) -> None:
        for names, rule in _RULES.items():
            for name in names:
                check_value(name, getattr(self, name), rule)


@with_suggestions
@torch.inference_mode(False)
@torch.no_grad()
def preprocess_blockwise(
    model: nn.Module | str | os.PathLike,
    config: AnyConfig,
    calibration: Iterable[Mapping[str, torch.Tensor] | torch.Tensor | str],
    tokenizer: Any = None,
    *,
    epochs: int = 2,
    learning_rate: float = 1e-2,
    scale_learning_rate: float = 1e-3,
    batch: int = 2,
    length: int = 1024,
    held_out: float = 1 / 16,
    offload: bool = False,
    seed: int = 0,
    resume_from: str | os.PathLike | None = None,
    progressbar: bool = True,
    model_init_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Train the rounding of the layers that `config` targets block by block (arXiv 2407.11062), in place.

    Each decoder block learns to give the outputs of the float block, on calibration text. Afterwards the model is a
    quantized one, as after `preprocess_gptq`.

    Memory above the float model (of one that is loaded here: one block, and what lies outside the blocks): twice the
    hidden states of the calibration tokens and, for one block at a time, about seven fp32 copies of its weights: the
    trained ones, gradients, Adam's moments, the best so far, and what rounding them in forward and backward takes.

    Args:
        model (nn.Module | str | os.PathLike): as for `preprocess_gptq`.
        config (LRQATConfig | LowBitSRConfig): its grid (`bits`, `group_size`, `symmetric`), where scales start
            (`range_method`, `range_p`, `scale_dtype`, `signed_scales`) and target modules are used, and `downcast`,
            which says what is left behind. "fx8" (the default below 8 bits): the trained weights with their fraction,
            as 8-bit layers, which LR-QAT takes as its base. "int", and for low-bit SR: the integers, `bits` wide.
        calibration (Iterable): as for `preprocess_gptq`. 512 windows of 1024 tokens or more are worth their time
            (EfficientQAT has 4096 of 2048).
        tokenizer (Any): for texts. They are joined by its end-of-text token and cut into windows of `length` tokens.
        epochs (int): over the calibration text, for each block.
        learning_rate (float): of weights and zero points, in grid steps. AdamW, with a cosine decay to 0.
        scale_learning_rate (float): of the relative change of the scales.
        batch (int): windows (rows of token ids) a step. 1 makes twice the steps of 2 from the same text and
            passes, which is worth it where they are few.
        length (int): tokens a window, for texts only.
        held_out (float): share of the text that is not trained on. A block keeps the state that is best there, of those
            before training and after each epoch.
        offload (bool): keep the hidden states of all tokens in the CPU's memory.
        seed (int): of the order of the text.
        resume_from (str | os.PathLike | None): a folder in which every trained block is kept, at a byte a weight. After
            an interruption, load the float model again and make the same call: it goes on at the first block that is
            not there, and gives what it would have given. The folder may be deleted afterwards.
        progressbar (bool): show the blocks go by, with the error on the held-out text before and after.
        model_init_kwargs (Mapping | None): as for `preprocess_gptq`.

    Returns:
        The model; `model` itself if it was one.

    Raises:
        ValueError: `config` is of another method, there is no calibration text or less than one window, the targeted
            layers are not those of decoder blocks, an option is out of range, or `resume_from` holds another run:
            nothing was changed then. Or no token reached a layer (some experts may go without), or outputs of a block,
            or weights of one that came in, are not finite: blocks before it are quantized by then, so load the model
            again.
        FileNotFoundError: `model` is neither a folder nor the name of a repository.

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_lrqat import LRQATConfig, preprocess_blockwise
        >>> config = LRQATConfig(bits=3, group_size=64, task_type="CAUSAL_LM")
        >>> quantized = preprocess_blockwise(base, config, texts, tokenizer, length=256)
        >>> quantized.save_pretrained("base-w3")  # adapters belong to this base
        >>> model = get_peft_model(quantized, config)  # to train on; or merge at once
    """
    settings = _Settings(epochs, learning_rate, scale_learning_rate, held_out, batch, seed)
    check_flags(offload=offload, progressbar=progressbar)
    if resume_from is not None:
        check_folder(resume_from=resume_from)
    check_config(config)
    if config.rounds_inputs:
        raise ValueError(
            f"`act_bits` is {config.act_bits}, but block-wise training does not round activations. Leave it out here; "
            "LR-QAT can train them on top."
        )
    if _downcast(config) not in ("fx8", "int"):
        raise ValueError(
            f"`downcast` is {_downcast(config)!r}, but block-wise training leaves 8-bit fixed point ('fx8') or "
            "integers ('int')."
        )
    with by_block(model, config, "block-wise training", model_init_kwargs) as model:
        name, blocks, layers = decoder_blocks(model, config, "block-wise training")
        bring_in(model, without=blocks)
        batches = list(_steps(read_batches(model, calibration, tokenizer, length), batch))
        results = None
        if resume_from is not None:
            results = BlockResults(resume_from, _identity(model, layers, batches, config, settings), config.grid)
        was_training = model.training
        model.eval()
        inputs = BlockInputs(model, blocks, batches, "cpu" if offload else None)
        floats = inputs.fork()  # the float model's own stream
        prefixes = [f"{name}.{index}." for index in range(len(blocks))]
        in_block = [{key: layer for key, layer in layers.items() if key.startswith(prefix)} for prefix in prefixes]
        last = max(index for index, own in enumerate(in_block) if own)
        del layers  # nothing keeps the float weights of a block that is done
        described = tqdm(range(last + 1), desc="block-wise", disable=not progressbar)
        for index in described:
            block, own, in_block[index] = blocks[index], in_block[index], {}
            try:
                own = {k.removeprefix(prefixes[index]): v for k, v in arrive(model, block, own, config).items()}
                floats.advance(index, block)
                if not own:
                    inputs.advance(index, block)
                    continue
                trained = None if results is None else results.read(index, next(iter(own.values())).weight.device)
                if trained is None:
                    trained, errors = _train(block, own, inputs, floats.hidden, index, config, settings)
                    described.set_postfix(error="{:.3g} -> {:.3g}".format(*errors))
                    if results is not None:
                        results.write(index, trained)
                rounded = {f"{k}.weight": one.rounded().dequantize(own[k].weight.dtype) for k, one in trained.items()}
                inputs.advance(index, block, rounded)
                for key, one in trained.items():
                    replace_layer(block, key, _left_behind(one, own[key], config))
            finally:
                settle_experts(block)
        model.train(was_training)
        if getattr(model, "config", None) is not None:
            describe(model, _record(config))
    return model


def _identity(
    model: nn.Module,
    layers: dict[str, nn.Linear],
    batches: list[dict[str, torch.Tensor]],
    config: AnyConfig,
    settings: _Settings,
) -> dict[str, Any]:
    """What the trained blocks depend on."""
    text = hashlib.blake2b(digest_size=8)
    for one in batches:
        for key in sorted(one):
            text.update(f"{key} {tuple(one[key].shape)}".encode())
            text.update(one[key].to("cpu", torch.int64).numpy().tobytes())
    checksums = {name: _checksum(value) for name, value in all_tensors(model) if not value.is_meta and value.numel()}
    weights = [checksums.pop(k if isinstance(v, ExpertStack) else f"{k}.weight") for k, v in layers.items()]
    described: Any = getattr(model, "config", None)
    fields = {} if described is None else described.to_dict()
    written = json.dumps({key: fields[key] for key in fields.keys() - _NO_RESULT}, sort_keys=True, default=str)
    return {
        **{name: getattr(config, name) for name in ("range_method", "range_p", "scale_dtype", "signed_scales")},
        **asdict(config.grid),
        **asdict(settings),
        "layers": len(layers),
        "weights": in_order(weights),
        "other_weights": in_order(checksums.values()),
        "config": hashlib.blake2b(written.encode(), digest_size=8).hexdigest(),
        "dtype": str(next(iter(layers.values())).weight.dtype),
        "text": text.hexdigest(),
    }


def _checksum(tensor: torch.Tensor) -> int:
    return float_checksum(tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)) or 0


def _steps(items: Iterable[dict[str, torch.Tensor]], batch: int) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of calibration batches, `batch` at a time as far as they are alike."""
    rows: list[dict[str, torch.Tensor]] = []
    for item in items:
        for index in range(len(item["input_ids"])):
            row = {key: value[index : index + 1] for key, value in item.items()}
            if rows and (len(rows) == batch or _shapes(row) != _shapes(rows[0])):
                yield _joined(rows)
                rows = []
            rows.append(row)
    if rows:
        yield _joined(rows)


def _shapes(row: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in row.items()}


def _joined(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def _train(
    block: nn.Module,
    layers: dict[str, nn.Linear],
    inputs: BlockInputs,
    targets: list[torch.Tensor],
    index: int,
    config: AnyConfig,
    settings: _Settings,
) -> tuple[dict[str, FixedPoint], tuple[float, float]]:
    """The trained weights of block number `index`, by the names of `layers`; the held-out errors before and after."""
    ranges = config.range_method or "lp", config.range_p, config.scale_dtype, config.signed_scales
    weights = {key: BlockWeight(layer.weight, config.grid, *ranges) for key, layer in layers.items()}

    def error(batch: int) -> torch.Tensor:
        built = {f"{key}.weight": weight() for key, weight in weights.items()}
        with _autocast(inputs.device, next(iter(layers.values())).weight.dtype):
            out = inputs.run_one(index, block, batch, built)
        return _relative_error(out, targets[batch].to(out.device), inputs.masks[batch])

    count = len(inputs.hidden)
    held = round(count * settings.held_out) or int(settings.held_out > 0 and count > 1)
    train, test = list(range(count - held)), list(range(count - held, count)) or list(range(count))

    def test_error() -> float:
        return torch.stack([error(batch) for batch in test]).mean().item()

    parameters = [parameter for weight in weights.values() for parameter in weight.parameters()]
    optimizer = _optimizer(weights.values(), settings)
    steps = settings.epochs * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    order = torch.Generator().manual_seed(settings.seed + index)
    reached: set[str] = set()
    stacks = {key: layer for key, layer in layers.items() if isinstance(layer, ExpertStack)}
    hit = {key: torch.zeros(stack.experts, dtype=torch.bool, device=inputs.device) for key, stack in stacks.items()}
    before = best = test_error()
    if not math.isfinite(before):
        raise ValueError(
            f"The outputs of block {index} on the calibration text are not finite numbers. Load the model in a wider "
            "dtype (torch.bfloat16), or look for damaged weights."
        )
    # Adam does not see the factor, which keeps the gradients of an error in the middle of what fp16 holds
    factor = targets[0].numel() * torch.stack([target.float().square().mean() for target in targets]).mean().sqrt()
    kept = [parameter.clone() for parameter in parameters]
    for _ in range(settings.epochs):
        for position in torch.randperm(len(train), generator=order).tolist():
            with torch.enable_grad():
                loss = error(train[position]) * factor
                # not `backward`, which would add to the gradients of the block's other parameters
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            reached |= {key for key, weight in weights.items() if weight.weight.grad is not None}
            for key, experts in hit.items():
                if (found := weights[key].weight.grad) is not None:
                    experts |= found.view(len(experts), -1).any(1)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()  # before the next ones are made: they are as large as the block in fp32
            del gradients
        if missed := sorted(weights.keys() - reached):
            raise ValueError(
                f"No calibration token reached layer {missed[0]!r} of block {index}. Leave it out of `target_modules`, "
                "or give more text."
            )
        now = test_error()
        if now < best:
            best = now
            for parameter, value in zip(parameters, kept, strict=True):
                value.copy_(parameter)
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.copy_(value)
    if spared := sorted({expert for experts in hit.values() for expert in (~experts).nonzero().flatten().tolist()}):
        warnings.warn(
            f"No calibration token reached {len(spared)} of the experts of block {index} ({some(spared)}). They are "
            "rounded as without calibration; more text reaches more of them.",
            stacklevel=3,
        )
    return {key: weight.fixed_point() for key, weight in weights.items()}, (before, best)


def _optimizer(weights: Iterable[BlockWeight], settings: _Settings) -> torch.optim.Optimizer:
    scales: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for weight in weights:
        for name, parameter in weight.named_parameters():
            (scales if name == "scale_shift" else others).append(parameter)
    groups = [
        {"params": others, "lr": settings.learning_rate},
        {"params": scales, "lr": settings.scale_learning_rate},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0, eps=1e-15, fused=True)


def _relative_error(out: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over tokens of |out - target|^2 / |target|^2: fp32 scalar."""
    target = target.float()
    size = target.square().sum(-1)
    errors = (out.float() - target).square().sum(-1) / size.clamp(min=1e-3 * size.mean())
    return errors.mean() if mask is None else errors[..., mask].mean()  # Gemma 3n has several streams


def _autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """bf16 on an accelerator."""
    wanted = device.type != "cpu" and dtype != torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def _downcast(config: AnyConfig) -> str | None:
    """What is left behind: "fx8" or "int"."""
    return config.downcast if isinstance(config, LRQATConfig) else "int"


def _left_behind(trained: FixedPoint, layer: nn.Linear, config: AnyConfig) -> nn.Module:
    experts = layer.experts if isinstance(layer, ExpertStack) else 1
    if _downcast(config) == "int":
        bits = config.container_bits or config.grid.code_bits
        return merged_layer(trained.rounded(), layer.bias, bits, layer.weight.dtype, experts=experts)
    return merged_layer(trained.eight_bits(), layer.bias, 8, layer.weight.dtype, experts=experts)


def _record(config: AnyConfig) -> Record:
    recipe = f"block-wise training (EfficientQAT's Block-AP, arXiv 2407.11062) for {config.grid.describe()}"
    if _downcast(config) == "int":
        return Record(config.grid, config.scale_dtype, recipe)
    wide = replace(config.grid, bits=8)
    recipe += ", kept with the weights' fraction for LR-QAT to start from"
    return Record(wide, config.scale_dtype, recipe, fixed_point_bits=config.bits)
