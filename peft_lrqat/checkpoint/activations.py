"""Merged layers that quantize their activations to 8 bits, per token, as the model was trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops.low_bit import quantize_activations

#: How many steps the largest magnitude of a token takes, by checkpoint format; see `quantize_activations`.
ACTIVATION_LEVELS = {"compressed-tensors": 127.5, "bitnet": 127.0}

_PER_BYTE = 4


class _StoredWeight(nn.Linear):
    """An nn.Linear whose file holds integers and scales under the names `weight` and `weight_scale`.

    Buffers:
        weight_codes: integers, as the file's `weight` stores them.
        weight_scale: in the model's dtype, weight units per grid step.
    """

    weight_codes: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, stored: torch.Tensor, scale: torch.Tensor, shape: torch.Size, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.register_buffer("weight_codes", stored)
        self.register_buffer("weight_scale", scale)
        self.register_parameter("bias", bias)

    @property
    def codes(self) -> torch.Tensor:
        """int8 (out, in)."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # a property on purpose
        """The weight that codes and scales stand for, (out, in) in the model's dtype. Built anew."""
        return (self.codes.float() * self.weight_scale.float()).to(self.weight_scale.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination.pop(prefix + "weight_codes")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if prefix + "weight" in state_dict:
            state_dict[prefix + "weight_codes"] = state_dict.pop(prefix + "weight")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Int8Linear(_StoredWeight):
    """compressed-tensors "int-quantized": 8-bit container, int8 activations per token (W8A8 to the engines)."""

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        """
        Args:
            codes: int8 (out, in).
            scale: fp32 (out, 1) or (1, 1), exactly representable in `dtype`.
        """
        super().__init__(codes, scale.expand(codes.shape[0], 1).to(dtype).contiguous(), codes.shape, bias)

    @property
    def codes(self) -> torch.Tensor:
        return self.weight_codes

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        x = quantize_activations(input, ACTIVATION_LEVELS["compressed-tensors"])
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class BitNetLinear(_StoredWeight):
    """transformers' own BitNet format (`AutoBitLinear`, offline): ternary codes, one scale, int8 activations.

    The file holds four codes a byte, code + 1 in two bits, from four blocks of rows; the scale multiplies the output.
    """

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
        """
        Args:
            codes: int8 (out, in) in {-1, 0, 1}; `out` a multiple of 4.
            scale: fp32 (1, 1), exactly representable in `dtype`.
        """
        blocks = (codes + 1).to(torch.uint8).view(_PER_BYTE, -1, codes.shape[1])
        stored = blocks[0].clone()
        for i in range(1, _PER_BYTE):
            stored |= blocks[i] << (2 * i)
        super().__init__(stored, scale.view(1).to(dtype), codes.shape, None)

    @property
    def codes(self) -> torch.Tensor:
        blocks = [(self.weight_codes >> (2 * i)) & 3 for i in range(_PER_BYTE)]
        return torch.cat(blocks).to(torch.int8) - 1

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        x = quantize_activations(input, ACTIVATION_LEVELS["bitnet"])
        return nn.functional.linear(x, self.codes.to(x.dtype)) * self.weight_scale
