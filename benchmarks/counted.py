"""Where the memory of a training step goes, counted from the shapes of the model: nothing is allocated.

    python benchmarks/counted.py 7B       # or: mixture; prints the table that tables.py writes into a page

The parts that last are counted. What is left of the peak that was measured lives for a part of a step: activations of
the block that runs, its gradients, the rounded weight of a layer.
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
_FULL = 'gpu_full: runs/[method="{}"]' + _STEP
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
        if not method.rank:  # a byte of momentum a weight, a number for each 256, and means of rows and columns
            state += parameter.numel() + 4 * channels * -(-columns // 256) + 4 * (rows + columns)
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
    """Markdown: parts, their sum, and what was measured; GiB.

    Args:
        figure: finds what stands at a place of a result (`tables.figure`).
    """
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


def main() -> None:
    from tables import figure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TABLES)
    print(table(parser.parse_args().name, figure), end="")


if __name__ == "__main__":
    main()
