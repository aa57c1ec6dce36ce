"""Random layers for the tests of the operation, and its formula in plain fp32 PyTorch, differentiated by autograd."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from peft_lrqat.grid import Grid, grouped
from peft_lrqat.ops import quantized_linear, trained_scale
from peft_lrqat.ops.factors import round_factors
from peft_lrqat.ops.stored_base import BaseFormat, decode_base, encode_base
from peft_lrqat.ranges import choose_range

ROWS, COLS, RANK = 13, 45, 5


@dataclass
class Problem:
    """Operands of `quantized_linear` as leaf tensors, and the output's gradient."""

    x: torch.Tensor
    base: torch.Tensor
    scale0: torch.Tensor
    shift: torch.Tensor
    zero_point: torch.Tensor | None
    A: torch.Tensor | None
    B: torch.Tensor | None
    bias: torch.Tensor | None
    dy: torch.Tensor
    grid: Grid
    downcast: str
    c: float = 1.0

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        named = {"x": self.x, "A": self.A, "B": self.B, "shift": self.shift, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def operands(self) -> tuple:
        return (
            self.x,
            self.base,
            self.scale0,
            self.shift,
            self.zero_point,
            self.A,
            self.B,
            self.bias,
            self.c,
            self.grid.bits,
            self.downcast,
            "auto",
        )

    @property
    def scale(self) -> torch.Tensor:
        """s, with a straight-through gradient to `shift`."""
        return trained_scale(self.scale0, self.shift, "auto")

    def clipped(self) -> torch.Tensor:
        """bool (out, in): where the clip acts."""
        levels = decode_base(self.base, BaseFormat(self.grid.bits, self.x.shape[-1], self.downcast))
        if self.A is not None:
            A, B = round_factors(self.A.detach(), self.B.detach(), self.c)
            levels = levels + B @ A
        return (levels.round() < self.grid.qmin) | (levels.round() > self.grid.qmax)

    def to(self, dtype: torch.dtype) -> Problem:
        """x, bias and dy rounded to `dtype`; the weight's side stays as it is."""

        def cast(tensor):
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

        return replace(self, x=cast(self.x), bias=cast(self.bias), dy=cast(self.dy))


def problem(
    bits: int = 4,
    group_size: int = -1,
    symmetric: bool = True,
    downcast: str = "fx8",
    *,
    bias: bool = False,
    clip: str = "few",
    shape: tuple[int, ...] = (2, 7),
    rows: int = ROWS,
    cols: int = COLS,
) -> Problem:
    """A layer whose codes move, with entries that are clipped.

    Args:
        clip: "none"; "few": some, but less than 2 %; "many": more than that.
    """
    grid = Grid(bits, group_size, symmetric)
    weight = torch.randn(rows, cols) * 0.02
    scale, zero = choose_range(weight, grid, "minmax")
    levels = grouped(weight, scale) / scale.unsqueeze(-1)
    if zero is not None:
        levels = levels + zero.unsqueeze(-1)
    base = encode_base(levels.reshape(rows, cols).contiguous(), bits, downcast)
    A, B = torch.randn(RANK, cols), torch.randn(rows, RANK) * 2 ** (bits - 2)
    if clip != "many":  # one component for each row of a few pushes, the others too weak to reach the grid's ends
        inside = 2.0 ** (bits - 1) - 0.6
        levels = decode_base(base, BaseFormat(bits, cols, downcast)).clamp(-inside, inside - 0.5)
        base = encode_base(levels.clone(), bits, downcast)
        A, B = A.clamp(-1, 1), B.sign() * 0.09 / RANK
        if clip == "few":
            A[0], B[:, 0] = 0.0, 0.0
            A[0, 1], A[0, cols - 1], B[0, 0], B[rows - 1, 0] = 2.0, -2.0, 2.0**bits, -(2.0**bits)
    x, dy = torch.randn(*shape, cols), torch.randn(*shape, rows)
    shift = torch.randn(scale.shape) * 0.1
    made = Problem(x, base, scale, shift, zero, A, B, torch.randn(rows) if bias else None, dy, grid, downcast)
    share = made.clipped().float().mean().item()
    low, high = {"none": (0, 0), "few": (1e-9, 0.02), "many": (0.0201, 0.9)}[clip]
    assert low <= share <= high, f"{share:.3%} of the entries are clipped, which is not what {clip!r} asks for"
    for leaf in made.leaves.values():
        leaf.requires_grad_()
    return made


def plain(p: Problem, weight_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The formula as the paper writes it: straight-through rounding (of the factors too), clip, scale, product."""
    z = decode_base(p.base, BaseFormat(p.grid.bits, p.x.shape[-1], p.downcast))
    if p.A is not None:
        A, B = p.A.float(), p.B.float() * p.c
        near_A, near_B = round_factors(p.A.detach(), p.B.detach(), p.c)
        z = z + (B + (near_B - B).detach()) @ (A + (near_A - A).detach())
    rounded = z + (z.round() - z).detach()
    levels = grouped(rounded.clamp(p.grid.qmin, p.grid.qmax), p.scale)
    if p.zero_point is not None:
        levels = levels - p.zero_point.unsqueeze(-1).float()
    weight = (levels * p.scale.unsqueeze(-1)).view(z.shape).to(weight_dtype)
    return torch.nn.functional.linear(p.x, weight, p.bias)


def ours(p: Problem) -> torch.Tensor:
    return quantized_linear(*p.operands)


def gradients(y: torch.Tensor, p: Problem) -> dict[str, torch.Tensor]:
    return dict(zip(p.leaves, torch.autograd.grad(y, list(p.leaves.values()), p.dy), strict=True))
