"""Where the memory of a training step goes, counted from the shapes of the model: nothing is allocated.

    python benchmarks/counted.py 7B       # or: mixture; prints the table that tables.py writes into a page
    python benchmarks/counted.py ranks    # what each of several GPUs holds
    python benchmarks/counted.py sent     # what each of 8 GPUs sends in a step
    python benchmarks/counted.py offloaded    # what a mixture holds whose base lies in the CPU's memory

The parts that last are counted. What is left of the peak that was measured lives for a part of a step: activations of
the block that runs, its gradients, the rounded weight of a layer.

Several GPUs: DDP reduces the gradients of all that is trained, around a ring. FSDP2 gathers each block for the forward
and again for the backward, packed as it is, and what lies outside the blocks once; and it reduces the same gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

GIB = 2**30
TOKENS = 4 * 1024


class Method(NamedTuple):
    """What is held for each weight of the blocks' linear layers.

    Attributes:
        bits: of a weight that is held.
        group: weights that share a scale; -1: a channel's; None: there are no scales.
        rank: of the adapters; 0: the weights themselves are trained, by `LowBitAdamW` with its factored state.
        scales: which changes of scales are trained: "group", "channel" or None.
        measured: where the peak of a step of 4 x 1024 tokens stands, as tables.py finds it.
    """

    bits: int
    group: int | None
    rank: int
    scales: str | None
    measured: str


_STEP = "/steps/4x1024/peak_gib"
_GPU = 'gpu: runs/[method="{}" size=7B layers lean offload bf16_adapters from_cpu graph autocast compile]' + _STEP
_FULL = 'gpu_full: runs/[method="{}" block_graphs]' + _STEP
_MOE = 'moe: runs/[method="{}" rank=8]' + _STEP
#: table -> column -> method
TABLES = {
    "7B": {
        "LoRA, bf16": Method(16, None, 32, None, _GPU.format("LoRA bf16")),
        "LR-QAT fx8, groups of 128": Method(8, 128, 32, "group", _GPU.format("LR-QAT fx8, groups of 128")),
        "LR-QAT int4, per channel": Method(4, -1, 32, "group", _GPU.format("LR-QAT int4")),
        "low-bit SR, 4 bits, factored state": Method(4, -1, 0, None, _FULL.format("low-bit SR int4, factored")),
    },
    "mixture": {
        "LoRA, bf16": Method(16, None, 8, None, _MOE.format("LoRA bf16")),
        "LR-QAT, fixed scales": Method(4, 128, 8, None, _MOE.format("LR-QAT int4, groups of 128, fixed scales")),
        "by channel": Method(4, 128, 8, "channel", _MOE.format("LR-QAT int4, groups of 128, by channel")),
        "by group": Method(4, 128, 8, "group", _MOE.format("LR-QAT int4, groups of 128")),
    },
}


def shapes(name: str) -> nn.Module:
    """The model of a table, on the meta device."""
    from common import LLAMA
    from moe import SHAPE
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    with torch.device("meta"):
        if name == "mixture":
            return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE))
        return LlamaForCausalLM(LlamaConfig(vocab_size=32000, tie_word_embeddings=False, **LLAMA[name]))


def parts(model: nn.Module, method: Method, tokens: int) -> dict[str, float]:
    """Bytes of what lasts, for a model in bf16 with fp32 adapters, AdamW and checkpointed blocks."""
    weights, trained, state = 0.0, 0, 0
    scales = rest = 0
    for name, parameter in model.named_parameters():
        if ".layers." not in name or parameter.dim() < 2 or name.endswith("mlp.gate.weight"):
            rest += 2 * parameter.numel()
            continue
        *experts, rows, columns = parameter.shape
        channels = prod(experts) * rows
        weights += parameter.numel() * method.bits / 8
        groups = parameter.numel() // columns * -(-columns // (method.group if (method.group or 0) > 0 else columns))
        scales += 4 * groups if method.group else 0
        trained += prod(experts) * method.rank * (rows + columns)
        trained += {"group": groups, "channel": channels, None: 0}[method.scales]
        if not method.rank:  # a byte of momentum a weight, a number for each 256, means of rows and columns, and theirs
            state += parameter.numel() + 4 * channels * -(-columns // 256) + 4 * (rows + columns + 1)
    inputs = 2 * tokens * model.config.hidden_size * model.config.num_hidden_layers
    return {
        "weights of the blocks": weights,
        "their scales, fp32": scales,
        "embeddings, output layer, norms, routers": rest,
        "adapters and changes of scales, fp32": 4 * trained,
        "the optimizer's state": state + 8 * trained,
        "inputs of blocks, kept by checkpointing": inputs,
    }


def table(name: str, figure: Callable[[str], Any]) -> str:
    """Markdown: parts, their sum, and what was measured, in GiB; or one of `PLANS`.

    Args:
        figure: finds what stands at a place of a result (`tables.figure`).
    """
    if name in PLANS:
        return PLANS[name]()
    model = shapes(name)
    columns = [parts(model, method, TOKENS) for method in TABLES[name].values()]
    peaks = [figure(method.measured) for method in TABLES[name].values()]
    sums = [sum(column.values()) / GIB for column in columns]
    rows = {part: [column[part] / GIB for column in columns] for part in columns[0]}
    rows["together"] = sums
    rows["measured at the peak"] = peaks
    rows["what lives for a part of a step"] = [peak - counted for peak, counted in zip(peaks, sums, strict=True)]
    lines = [f"| GiB, 4 x 1024 tokens | {' | '.join(TABLES[name])} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {row} | {' | '.join(f'{n:.2f}' if n else '' for n in numbers)} |" for row, numbers in rows.items()]
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |") + "\n"


#: of the plan for several GPUs
PLANNED = {
    "LoRA, bf16": Method(16, None, 32, None, ""),
    "LR-QAT as it comes: fx8, groups of 128": Method(8, 128, 32, "group", ""),
    "LR-QAT int4, groups of 128": Method(4, 128, 32, "group", ""),
    'the same, `learn_scales="channel"`': Method(4, 128, 32, "channel", ""),
    "low-bit SR, 4 bits, factored state": Method(4, -1, 0, None, ""),
}
#: link -> bytes a second that it carries in one direction
LINKS = {"NVLink": 450e9, "400 Gb/s": 50e9, "10 Gb/s": 1.25e9}


class Ranks(NamedTuple):
    """What ranks hold and send, in bytes.

    Attributes:
        lasting: parts of one process, without the inputs of blocks.
        inputs: of blocks, of a rank's tokens.
        gradients: of all that is trained, fp32.
        blocks: frozen and trained parameters of all blocks.
        root: those outside.
        depth: number of blocks.
    """

    lasting: float
    inputs: float
    gradients: float
    blocks: float
    root: float
    depth: int

    def one(self) -> float:
        """Held by one process, with all gradients."""
        return self.lasting + self.inputs + self.gradients

    def ddp(self) -> float:
        """Held by a rank, however many there are: DDP's buckets are as large as the gradients."""
        return self.one() + self.gradients

    def fsdp(self, ranks: int) -> float:
        """Held by one of so many ranks: its share, its inputs, and the block that runs with the next one."""
        return (self.lasting + self.gradients) / ranks + self.inputs + 2 * self.blocks / self.depth

    def ddp_sent(self, ranks: int) -> float:
        """By a rank in a step: a ring's all-reduce passes everything on twice, but for the rank's own share."""
        return 2 * (ranks - 1) / ranks * self.gradients

    def fsdp_sent(self, ranks: int) -> float:
        """By a rank in a step: what is gathered, and the gradients, which are scattered once."""
        return (ranks - 1) / ranks * (2 * self.blocks + self.root + self.gradients)


def ranks_of(model: nn.Module, method: Method, tokens: int) -> Ranks:
    """What ranks hold that train a model with `tokens` each."""
    found = parts(model, method, tokens)
    inputs = found.pop("inputs of blocks, kept by checkpointing")
    norms = 2 * sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 1)
    root = found["embeddings, output layer, norms, routers"] - norms
    state = found["the optimizer's state"]
    lasting = sum(found.values())
    gradients = found["adapters and changes of scales, fp32"]
    if not method.rank:
        gradients = 4 * 8 * found["weights of the blocks"] / method.bits
    return Ranks(lasting, inputs, gradients, lasting - state - root, root, model.config.num_hidden_layers)


def _planned() -> list[tuple[str, Method, Ranks]]:
    models = {size: shapes(size) for size in ("7B", "13B", "70B")}
    return [
        (f"{size}, {name}", method, ranks_of(model, method, TOKENS))
        for size, model in models.items()
        for name, method in PLANNED.items()
    ]


def held_by_ranks() -> str:
    """Markdown: what a rank holds; GiB."""
    lines = [
        "| GiB a rank, 4 x 1024 tokens each | one GPU | DDP | FSDP2, 8 GPUs | FSDP2, 64 GPUs |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, method, ranks in _planned():
        if method.rank:
            numbers = [ranks.one(), ranks.ddp(), ranks.fsdp(8), ranks.fsdp(64)]
        else:  # `fused_backward`, which one GPU may have, holds a layer's gradient at a time
            numbers = [ranks.one() - ranks.gradients, ranks.ddp()]
        cells = [f"{number / GIB:.1f}" for number in numbers] + ["refused"] * (4 - len(numbers))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sent_by_ranks() -> str:
    """Markdown: what each of 8 ranks sends in a step, in GB, and the seconds that this takes a link."""
    ways = {"DDP": list(LINKS), "FSDP2": ["NVLink", "400 Gb/s"]}
    heads = [f"{way}: {unit}" for way, links in ways.items() for unit in ("GB", *(f"s, {link}" for link in links))]
    lines = [f"| each of 8 GPUs, a step | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name, method, ranks in _planned():
        cells = []
        for way, sent in (("DDP", ranks.ddp_sent(8)), ("FSDP2", ranks.fsdp_sent(8))):
            seconds = [sent / LINKS[link] for link in ways[way]]
            shown = [f"{sent / 1e9:.1f}", *(f"{second:.3f}" if second < 1 else f"{second:.1f}" for second in seconds)]
            cells += shown if way == "DDP" or method.rank else ["refused", *[""] * len(seconds)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |") + "\n"


def held_offloaded() -> str:
    """Markdown: what a mixture holds whose base lies in the CPU's memory, at several ranks; GiB."""
    from tables import figure

    model, columns = shapes("mixture"), {}
    for rank, state in ((8, 8), (4, 8), (2, 8), (8, 2)):  # bytes of optimizer state for a trained number
        found = parts(model, Method(4, 128, rank, "channel", ""), 1024)
        weights, scales = found["weights of the blocks"], found["their scales, fp32"]
        trained = found["adapters and changes of scales, fp32"]
        on_gpu = {
            "two layers of the base": 2 * (weights + scales) / model.config.num_hidden_layers,
            "embeddings, output layer, norms, routers": found["embeddings, output layer, norms, routers"],
            "adapters and changes of scales, with gradients": 2 * trained,
            "the optimizer's state": state * trained / 4,
        }
        measured = _OFFLOADED.get((rank, state))
        columns[f"rank {rank}" + (", 8-bit Adam" if state == 2 else "")] = [
            *on_gpu.values(),
            sum(on_gpu.values()),
            None if measured is None else GIB * figure(measured),
        ]
    names = [*on_gpu, "together", "measured at the peak"]
    lines = [f"| GiB on the GPU, 1 x 1024 tokens | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, numbers in zip(names, zip(*columns.values(), strict=True), strict=True):
        lines.append(f"| {name} | {' | '.join('' if n is None else f'{n / GIB:.1f}' for n in numbers)} |")
    held = f"{weights / GIB:.1f} GiB of codes and {scales / GIB:.1f} of scales"
    return (
        "\n".join([*lines, "", f"The CPU's memory holds {held}."]).replace("|  |", "| |").replace("|  |", "| |") + "\n"
    )


#: rank, bytes of optimizer state -> where the peak stands
_OFFLOADED = {
    (8, 8): "moe_offload: runs/[offload_base=true rank=8]/steps/1x1024/peak_gib",
    (4, 8): "moe_8gib: runs/0/steps/1x1024/peak_gib",
}
PLANS = {"ranks": held_by_ranks, "sent": sent_by_ranks, "offloaded": held_offloaded}


def main() -> None:
    from tables import figure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*TABLES, *PLANS])
    print(table(parser.parse_args().name, figure), end="")


if __name__ == "__main__":
    main()
