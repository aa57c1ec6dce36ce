"""transformers' own BitNet format: ternary weights with one scale per tensor, 8-bit activations per token.

Two classes of layers read it, with the same name for opposite things: `AutoBitLinear` (mode "offline") multiplies with
`weight_scale`, which is then s, exactly; `BitLinear` divides by it, so it is 1 / s, rounded: exact where s is a power
of two, and elsewhere the engine's scale differs from the trained one in its last bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...grid import GridTensor
from ...modules.rounded_input import BitNetLinear
from ...ops.activations import describe_rule
from .. import bitnet
from ..source import LayerInfo, Source
from ..writer import Loss, Problem, Settings
from .base import SafetensorsWriter, no_linear, one_grid

LINEAR_CLASSES = ("autobitlinear", "bitlinear")


class BitNetWriter(SafetensorsWriter):
    """See the module's docstring."""

    name = "bitnet"
    usage = """```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/or/repo")
```"""

    @dataclass(frozen=True)
    class Options:
        """Options of format "bitnet"."""

        linear_class: str = field(
            default="autobitlinear",
            metadata={"help": "Which class of transformers shall read it: autobitlinear (exact), or bitlinear."},
        )

        def __post_init__(self) -> None:
            if self.linear_class not in LINEAR_CLASSES:
                allowed = ", ".join(map(repr, LINEAR_CLASSES))
                raise ValueError(f"`linear_class` is {self.linear_class!r}; allowed are {allowed}.")

    def problems(self, source: Source, settings: Settings) -> list[Problem]:
        found = no_linear(source, "BitNet's format") or one_grid(source)
        if settings.container_bits not in (None, 2):
            found.append(Problem(None, f"container_bits={settings.container_bits}, but BitNet stores 2 bits a code",
                                 "leave container_bits out"))  # fmt: skip
        if source.activations != self.name:
            trained, here = describe_rule(source.activations), describe_rule(self.name)
            reason = f"activations were trained as {trained}, and BitNet's layers round them to {here}"
            hint = "train with LowBitSRConfig(bits=1.58, group_size=0, act_bits=8), or allow_inexact=True"
            found.append(Problem(None, reason, hint, inexact=True))
        for name, info in self.packed(source).items():
            grid = info.grid
            if not grid.ternary or grid.group_size != 0:
                reason = f"its grid is {grid.describe()}; BitNet's format holds ternary weights with one scale a tensor"
                found.append(Problem(name, reason, "train with bits=1.58, group_size=0; or use compressed-tensors"))
            elif info.bias and settings.options.linear_class == "autobitlinear":
                reason = "it has a bias, which transformers' layer would multiply with the weight's scale"
                found.append(Problem(name, reason, "use compressed-tensors, or leave the layer out of training"))
            elif info.out_features % 4:
                reason = f"{info.out_features} output features do not divide by 4, the codes of a byte"
                found.append(Problem(name, reason, "use compressed-tensors, or leave the layer out of training"))
            elif settings.options.linear_class == "bitlinear" and not _inverse_is_exact(source.scale(name), info.dtype):
                reason = "bitlinear stores 1 / scale, and this scale is no power of two"
                hint = "linear_class='autobitlinear', or allow_inexact=True"
                found.append(Problem(name, reason, hint, inexact=True))
        return found

    def quantization_config(self, source: Source, settings: Settings) -> dict[str, Any]:
        return bitnet.quantization_config(source.float_linears, settings.options.linear_class)

    def stored(self, name: str, weight: GridTensor, info: LayerInfo, settings: Settings, loss: Loss) -> GridTensor:
        if settings.options.linear_class != "bitlinear" or _inverse_is_exact(weight.scale, info.dtype):
            return weight
        rounded = replace(weight, scale=1 / _inverse(weight.scale, info.dtype).float())
        loss.add(weight, rounded)
        return rounded

    def tensors(self, name: str, weight: GridTensor, info: LayerInfo, settings: Settings) -> dict[str, torch.Tensor]:
        tensors = BitNetLinear(weight, info.dtype).state_dict()
        if settings.options.linear_class == "bitlinear":
            tensors["weight_scale"] = _inverse(weight.scale, info.dtype).view(1)
        return tensors

    def write(self, source, folder, settings, progress):
        written = super().write(source, folder, settings, progress)
        written.container = f"bitnet ({settings.options.linear_class}), 2 bits"
        return written


def _inverse(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (1 / scale).to(dtype)


def _inverse_is_exact(scale: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether dividing by the stored inverse is multiplying with the scale."""
    mantissa = torch.frexp(scale)[0]
    inverse = _inverse(scale, dtype).float()
    return bool((mantissa == 0.5).all() and torch.isfinite(inverse).all() and torch.equal(1 / inverse, scale))
