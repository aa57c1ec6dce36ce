"""The rows of accuracy.py: how each method turns the float model into what is trained, or into what is rounded."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training import batches, targets

from peft_lrqat import Grid, LowBitSRConfig, LRQATConfig, preprocess_rotation
from peft_lrqat.grid import dequantize, grouped, quantize
from peft_lrqat.ranges import choose_range

#: What a row may set, with the defaults; what a method's config has besides may be set too.
DEFAULTS: dict[str, Any] = {
    "bits": 4,
    "group": 64,  # -1: one scale a channel
    "symmetric": True,
    "signed": False,  # whether the sign of a scale chooses the side with one level more; the configs' default is True
    "p": 2.5,  # the range norm
    "steps": 300,
    "batch": 8,
    "parts": 1,  # a batch's gradients are summed over so many parts
    "lr": None,  # by method
    "scale_lr": 1e-3,
    "norm_lr": 0.0,  # of the weights of norms, where a PEFT method trains them as well (`modules_to_save`)
    "rank": 32,
    "c": 16,  # lora_alpha / r
    "kl": 0.0,  # weight of KL to the float model in the loss; 1: nothing else
    "temperature": 1.0,
    "rotate": False,  # the float model that everything begins with is rotated; also start=rotation
    "rotate_seed": 0,
    "start": None,  # gptq, blockwise: what the weights are before training; start_*: its options
    "start_windows": 128,
    "then": None,  # lora: gptq, blockwise or a peer rounds the merged model; None: to nearest, the better of two norms
    "iters": 200,  # autoround
    "hellaswag": False,
    "seed": 0,
}
LEARNING_RATES = {"float": 5e-5, "lsq": 1e-4, "lora": 1e-3, "lrqat": 1e-3, "scales": 1e-3, "lowbit": 1e-4}
METHODS = (*LEARNING_RATES, "round", "hqq", "autoround", "llmcompressor")
_CONFIGS = {"lrqat": LRQATConfig, "scales": LRQATConfig, "lowbit": LowBitSRConfig}


def read_job(line: str) -> list[dict[str, Any]]:
    """`lrqat bits=4 group=64 kl=0,1 seed=0,1,2`: method, then options; a comma makes a job of each value.

    `act_bits_pattern=down_proj:8;o_proj:none` is a dictionary.

    Raises:
        ValueError: there is no such method or option.
    """
    method, *options = line.split()
    if method not in METHODS:
        raise ValueError(f"{line!r}: the method must be one of {', '.join(METHODS)}.")
    jobs: list[dict[str, Any]] = [{"method": method}]
    known = {f.name for f in fields(_CONFIGS[method])} if method in _CONFIGS else set()
    for option in options:
        key, _, values = option.partition("=")
        if key not in DEFAULTS and key not in known and not key.startswith("start_"):
            raise ValueError(f"{line!r}: no option {key!r}; there are {', '.join(DEFAULTS)} and those of the config.")
        jobs = [{**job, key: _value(text)} for job in jobs for text in values.split(",")]
    return jobs


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    if ":" in text:  # down_proj:8;o_proj:none
        return {key: _value(value) for key, _, value in (part.partition(":") for part in text.split(";"))}
    return text


def complete(job: dict[str, Any]) -> dict[str, Any]:
    """A job with every option."""
    full = {**DEFAULTS, **job}
    if full["start"] == "rotation":
        full |= {"start": None, "rotate": True}
    if full["then"] and job["method"] != "lora":
        raise ValueError(f"then={full['then']} is for lora: {job['method']} is rounded while it is trained.")
    full["lr"] = LEARNING_RATES.get(job["method"]) if full["lr"] is None else full["lr"]
    if job["method"] not in LEARNING_RATES:
        full["steps"] = 0
    return full


# -- full QAT


class _Lsq(torch.autograd.Function):
    """W^ = s (clip(round(W / s) + z) - z) with LSQ's gradients (arXiv 1902.08153)."""

    @staticmethod
    def forward(ctx, weight, scale, zero, grid):
        levels = grouped(weight, scale) / scale.unsqueeze(-1)
        low, high = grid.qmin - zero.unsqueeze(-1), grid.qmax - zero.unsqueeze(-1)
        q = torch.minimum(torch.maximum(levels.round(), low), high)
        ctx.save_for_backward(levels, q, (levels >= low) & (levels <= high))
        return (q * scale.unsqueeze(-1)).view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        levels, q, inside = ctx.saved_tensors
        grouped_grad = grad.view_as(q)
        scale_grad = (grouped_grad * torch.where(inside, q - levels, q)).sum(-1)
        return (grouped_grad * inside).view_as(grad), scale_grad, None, None


class LsqLinear(nn.Module):
    """Full QAT of one linear layer: fp32 master, scales in relative units."""

    def __init__(self, linear: nn.Linear, grid: Grid, p: float, signed: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.grid = linear.weight, linear.bias, grid
        scale, zero = choose_range(linear.weight.detach(), grid, "lp", p, signed=signed)
        self.register_buffer("scale0", scale)
        self.register_buffer("zero", torch.zeros_like(scale) if zero is None else zero.float())
        self.shift = nn.Parameter(torch.zeros_like(scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = _Lsq.apply(self.weight, self.scale0 * (1 + self.shift), self.zero, self.grid)
        return nn.functional.linear(x, weight, self.bias)


# -- rounding


@torch.no_grad()
def round_model(model: nn.Module, job: dict[str, Any]) -> None:
    """Every targeted weight to the nearest of its grid, in place."""
    grid = Grid(job["bits"], job["group"], job["symmetric"])
    for _, _, linear in targets(model):
        scale, zero = choose_range(linear.weight, grid, "lp", job["p"], signed=job["signed"])
        linear.weight.copy_(dequantize(quantize(linear.weight, scale, zero, grid), scale, zero, torch.float32))


@torch.no_grad()
def _hqq(model: nn.Module, job: dict[str, Any], text: Text) -> nn.Module:
    """Half-quadratic quantization; asymmetric, and its zero points are floats: more than the other rows store."""
    from hqq.core.quantize import Quantizer

    for _, _, linear in targets(model):
        group = job["group"] if job["group"] > 0 else linear.in_features
        device = str(linear.weight.device)
        packed, meta = Quantizer.quantize(
            linear.weight.data,
            nbits=job["bits"],
            group_size=group,
            axis=1,
            optimize=True,
            compute_dtype=torch.float32,
            device=device,
            bitpack=False,
        )
        linear.weight.copy_(Quantizer.dequantize(packed, meta).view_as(linear.weight))
    return model


def _autoround(model: nn.Module, job: dict[str, Any], text: Text) -> nn.Module:
    from auto_round import AutoRound

    data = [{"input_ids": row} for row in text.calibration(job)]
    device = next(model.parameters()).device
    rounded = AutoRound(
        model,
        text.tokenizer(),
        bits=job["bits"],
        group_size=job["group"],
        sym=job["symmetric"],
        dataset=data,
        iters=job["iters"],
        nsamples=len(data),
        seqlen=text.seq,
        batch_size=8,
        seed=job["seed"],
        enable_torch_compile=False,
    )
    model, _ = rounded.quantize()
    return model.float().to(device)


def _llmcompressor(model: nn.Module, job: dict[str, Any], text: Text) -> nn.Module:
    """llm-compressor's GPTQ."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    rows = [row[0].tolist() for row in text.calibration(job)]
    grouped_by = {"strategy": "channel"} if job["group"] < 0 else {"strategy": "group", "group_size": job["group"]}
    weights = QuantizationArgs(num_bits=job["bits"], symmetric=job["symmetric"], **grouped_by)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    device = next(model.parameters()).device
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(rows),
        max_seq_length=text.seq,
    )
    return model.to(device)


PEERS = {"hqq": _hqq, "autoround": _autoround, "llmcompressor": _llmcompressor}


def round_by(model: nn.Module, job: dict[str, Any], text: Text) -> nn.Module:
    """What a float model becomes by `then`, a peer or one of our own starts without training after it."""
    if job["then"] in PEERS:
        return PEERS[job["then"]](model, job, text)
    return make_start(model, {**job, "method": "lrqat", "start": job["then"], "downcast": "int"}, text)


# -- what is trained


def float_model(model: nn.Module, job: dict[str, Any]) -> nn.Module:
    """A copy of the float model that a row begins with."""
    model = copy.deepcopy(model)
    if job["rotate"]:
        preprocess_rotation(model, seed=job["rotate_seed"], progressbar=False)
    return model


class Text:
    """Training text, and what a method may want of it."""

    def __init__(self, train: Any, seq: int, bos: int | None, model: Path) -> None:
        self.train, self.seq, self.bos, self.model = train, seq, bos, model

    def batches(self, steps: int, size: int, seed: int) -> Iterator[torch.Tensor]:
        return batches(self.train, steps, size, seed, self.seq, self.bos)

    def calibration(self, job: dict[str, Any]) -> list[torch.Tensor]:
        """(1, seq) windows of training text."""
        return list(self.batches(job["start_windows"], 1, 1000 + job.get("start_seed", 0)))

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)


def config_of(job: dict[str, Any]) -> Any:
    """The PEFT config of a row."""
    kind = _CONFIGS[job["method"]]
    options: dict[str, Any] = {
        "bits": job["bits"],
        "group_size": job["group"],
        "range_p": job["p"],
        "signed_scales": job["signed"],
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    if job["method"] == "scales":
        options |= {"r": 0, "downcast": "int"}
    elif job["method"] == "lrqat":
        options |= {"r": job["rank"], "lora_alpha": round(job["c"] * job["rank"])}
    else:
        options |= {"keep_base": False, "seed": job["seed"]}
    if kind is LRQATConfig:
        options["symmetric"] = job["symmetric"]
    options["learn_scales"] = job["scale_lr"] > 0
    options |= {"modules_to_save": ["norm"]} if job["norm_lr"] else {}
    names = {f.name for f in fields(kind)} - {"symmetric"}
    return kind(**options | {key: value for key, value in job.items() if key in names and key not in ("bits",)})


def start_key(job: dict[str, Any]) -> str | None:
    """Names what `start` leaves, for rows that share it; None: nothing to share."""
    if not job["start"]:
        return None
    parts = {k: v for k, v in sorted(job.items()) if k.startswith("start_")}
    parts |= {k: job[k] for k in ("bits", "group", "symmetric", "signed", "p")}
    parts |= {k: job[k] for k in ("rotate", "rotate_seed") if job["rotate"]}
    parts["integers"] = job["method"] in ("scales", "lowbit") or job.get("downcast") == "int"
    if job["method"] == "lowbit" and job["bits"] not in (2, 3, 4):  # where LR-QAT's scales start elsewhere
        parts["ranges"] = "lowbit"
    return "-".join([job["start"], *(f"{k}={v}" for k, v in parts.items())])


def make_start(model: nn.Module, job: dict[str, Any], text: Text) -> nn.Module:
    """The model after `start`."""
    import peft_lrqat

    function = getattr(peft_lrqat, f"preprocess_{job['start']}")
    known = set(inspect.signature(function).parameters)
    options = {k.removeprefix("start_"): v for k, v in job.items() if k.startswith("start_")}
    options.pop("windows"), options.pop("seed", None)
    if unknown := set(options) - known:
        raise ValueError(f"preprocess_{job['start']} has no {', '.join(sorted(unknown))}.")
    weights = {k: v for k, v in job.items() if not k.startswith(("act_", "kv_"))}  # those are rounded in training only
    function(model.eval(), config_of(weights), text.calibration(job), progressbar=False, **options)
    return model


def prepare(model: nn.Module, job: dict[str, Any], text: Text) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model to train or to measure, and its optimizer groups (none where nothing is trained)."""
    from peft import LoraConfig, get_peft_model

    method = job["method"]
    model.requires_grad_(False)
    if method == "round":
        round_model(model, job)
        return model, []
    if method in PEERS:
        return PEERS[method](model, job, text), []
    if method == "float":
        return model, [
            {"params": [linear.weight.requires_grad_(True) for _, _, linear in targets(model)], "lr": job["lr"]}
        ]
    if method == "lsq":
        grid = Grid(job["bits"], job["group"], job["symmetric"])
        for parent, name, linear in targets(model):
            setattr(parent, name, LsqLinear(linear, grid, job["p"], job["signed"]))
            linear.weight.requires_grad_(True)
        scales = "shift"
    elif method == "lora":
        options = {"r": job["rank"], "lora_alpha": job["rank"], "target_modules": "all-linear"}
        model, scales = get_peft_model(model, LoraConfig(**options, task_type="CAUSAL_LM")), "none"
    else:
        model, scales = get_peft_model(model, config_of(job)), "scale"
        if job.get("act_scale") == "static":
            from peft_lrqat import calibrate_activations

            calibrate_activations(model, text.calibration(job))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    norms = [(n, p) for n, p in named if "modules_to_save" in n]
    layers = [(n, p) for n, p in named if "modules_to_save" not in n]
    return model, [
        {"params": [p for n, p in layers if scales not in n], "lr": job["lr"]},
        {"params": [p for n, p in layers if scales in n], "lr": job["lr"] if method == "scales" else job["scale_lr"]},
        {"params": [p for _, p in norms], "lr": job["norm_lr"]},
    ]
