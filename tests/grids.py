"""Models whose linear layers lie on any grid, without training: random codes that reach both ends of the grid."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from peft_lrqat.formats.record import Record
from peft_lrqat.grid import Grid, GridTensor, snap_scale
from peft_lrqat.modules.packed import describe, merged_layer
from peft_lrqat.ops.activations import Activations
from tests.models import adapted, tiny

#: Both divide by 32, as GPTQ wants it; 96 does not divide by 64.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}


def either_sign(scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The scales with random signs, on grids where that means something."""
    if grid.ternary or not grid.symmetric:
        return scale
    return torch.where(torch.rand(scale.shape) < 0.5, -scale, scale)


def random_tensor(grid: Grid, out_features: int, in_features: int, scale_dtype: str = "auto") -> GridTensor:
    """Codes that are uniform on the grid, and scales of a usual size, of both signs where `signed_scales` gives such;
    zero points above the lowest code."""
    codes = torch.randint(grid.qmin, grid.qmax + 1, (out_features, in_features), dtype=torch.int8)
    codes[0, 0], codes[-1, -1] = grid.qmin, grid.qmax
    shape = grid.scale_shape(out_features, in_features)
    spread = max(1, grid.qmax - grid.qmin) * in_features**0.5
    scale = either_sign(snap_scale((0.5 + torch.rand(shape)) * 4 / spread, scale_dtype), grid)
    zero = None if grid.symmetric else torch.randint(grid.qmin + 1, grid.qmax + 1, shape, dtype=torch.int8)
    return GridTensor(codes, scale, zero, grid)


def on_grid(
    grid: Grid,
    *,
    family: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    container_bits: int | None = None,
    act: str | None = None,
    scale_dtype: str = "auto",
    leave_out: tuple[str, ...] = (),
    seed: int = 0,
    **overrides,
) -> PreTrainedModel:
    """A merged model on `grid`, as `merge_and_unload` leaves it.

    Args:
        act: None, or the format whose 8-bit activations it has: "compressed-tensors" or "bitnet".
        leave_out: parts of names of linear layers that stay float, besides the head.
    """
    torch.manual_seed(seed)
    model = tiny(family, dtype=dtype, **{**SIZES, **overrides})
    bits = container_bits or grid.code_bits
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        if name == "lm_head" or any(part in name for part in leave_out):
            continue
        weight = random_tensor(grid, module.out_features, module.in_features, scale_dtype)
        parent, _, child = name.rpartition(".")
        activations = Activations(act) if act else None
        layer = merged_layer(weight, module.bias, bits, dtype, activations=activations)
        setattr(model.get_submodule(parent), child, layer)
    describe(model)
    Record(grid, scale_dtype).put_into(model.config)
    return model


def adapted_for_gguf(**config) -> PeftModel:
    """A randomly adapted llama whose layers divide into GGUF's blocks of 32."""
    settings = {"bits": 4, "group_size": 32, "range_method": "minmax", "init_lora_weights": False, **config}
    return adapted(tiny("llama", **SIZES), **settings)
