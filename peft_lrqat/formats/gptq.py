"""The GPTQ layout: packing of a layer, and config.json's side.

    qweight   int32 (in * bits / 32, out)        codes u = q + 2^(bits-1), packed along the inputs, first in lowest bits
    qzeros    int32 (groups, out * bits / 32)    u of the zero point, packed along the outputs; less one in version 1
    scales    fp16  (groups, out)
    g_idx     int32 (in,)                        group of an input: i // group_size

    W = scales * (u - zero)

Both packings are dense little-endian bit streams (32 codes of 3 bits in three words), as `packing.py` has them. Version
1 ("gptq", which every engine reads) stores zero - 1 and so has no zero point u = 0; version 2 ("gptq_v2") has.
"""

from __future__ import annotations

from typing import Any

import torch

from ..grid import GridTensor
from ..packing import pack

BITS = (2, 3, 4, 8)
VERSIONS = ("gptq", "gptq_v2")


def pack_layer(weight: GridTensor, bits: int, group_size: int, version: str) -> dict[str, torch.Tensor]:
    """The four tensors of a layer, all exact.

    Args:
        weight: (out, in); both multiples of 32; scales that fp16 holds.
        bits: width of the stored codes, one of `BITS`, at least the grid's.
        group_size: of the file; divides the grid's group (or the whole row: -1), whose scales are repeated.
        version: one of `VERSIONS`.

    Raises:
        ValueError: version 1, and a zero point lies at the lower end of the stored codes.
    """
    out_features, in_features = weight.codes.shape
    groups = in_features // group_size if group_size > 0 else 1

    def spread(per_scale: torch.Tensor) -> torch.Tensor:  # (rows, groups of the grid) to (groups of the file, out)
        per_row = per_scale.expand(out_features, -1)
        return per_row.repeat_interleave(groups // per_row.shape[1], dim=1).t().contiguous()

    zero = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero_point is None else weight.zero_point
    if version == "gptq":
        if int(zero.min()) == -(1 << (bits - 1)):
            raise ValueError(
                "A zero point lies at the lower end of the codes, which version 1 of GPTQ cannot hold. Pass "
                "checkpoint_format='gptq_v2', or container_bits wider than the grid."
            )
        zero = zero - 1
    return {
        "qweight": pack(weight.codes, bits).t().contiguous(),
        "qzeros": pack(spread(zero), bits),
        "scales": spread(weight.scale).to(torch.float16),
        "g_idx": (torch.arange(in_features, dtype=torch.int32) // (group_size if group_size > 0 else in_features)),
    }


def quantization_config(
    bits: int, group_size: int, symmetric: bool, version: str, packed: list[str], float_linears: list[str]
) -> dict[str, Any]:
    """config.json's `quantization_config`, which is quantize_config.json as well.

    Args:
        packed: names of the packed modules.
        float_linears: names of the other nn.Linear modules. Engines expect a float head; any other is said in both ways
            that engines read, by what is packed (transformers, vLLM) and by what is not (gptqmodel, vLLM).
    """
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": symmetric,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "lm_head": False,
        "meta": {"quantizer": ["peft-lrqat"]},
    }
    left_out = [name for name in float_linears if in_block(name)]
    if left_out:
        config["modules_in_block_to_quantize"] = [sorted(packed)]
        config["dynamic"] = {"-:^" + name.replace(".", r"\.") + "$": {} for name in left_out}
    return config


def in_block(name: str) -> bool:
    """Whether a module belongs to one of a model's numbered blocks: "model.layers.0.mlp.up_proj"."""
    return any(part.isdigit() for part in name.split("."))
