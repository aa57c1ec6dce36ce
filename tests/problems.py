"""Random layers for the tests of the operations, and their formula in plain fp32 PyTorch, differentiated by autograd.

What interacts decides what the tests cross. The bits and how the base is stored (`KINDS`) meet in decoding, which gives
one fp32 matrix whatever they were. Granularity, zero points, clipping, a bias and the gradients asked for meet in which
way the backward takes and how it adds up. So tests go through all of the one with some of the other, and the reverse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from peft_lrqat.grid import Grid, grouped
from peft_lrqat.ops import quantized_linear, trained_scale
from peft_lrqat.ops.factors import round_factors
from peft_lrqat.ops.stored_base import DOWNCASTS, BaseFormat, decode_base, encode_base
from peft_lrqat.ranges import choose_range

ROWS, COLS, RANK = 13, 45, 5
#: Groups of 9 whose scales are trained one by one, and by one shift for all of a row.
BY_CHANNEL = "by channel"
GRANULARITY = (9, BY_CHANNEL, -1, 0)
KINDS = [(bits, downcast) for bits in (2, 3, 4, 8) for downcast in DOWNCASTS if (bits, downcast) != (8, "fx8")]
#: Where kernels are tested: on a GPU where there is one, else in Triton's interpreter.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
    def fmt(self) -> BaseFormat:
        return BaseFormat(self.grid.bits, self.x.shape[-1], self.downcast)

    @property
    def scale(self) -> torch.Tensor:
        """s, with a straight-through gradient to `shift`."""
        return trained_scale(self.scale0, self.shift, "auto")

    def clipped(self) -> torch.Tensor:
        """bool (out, in): where the clip acts."""
        levels = decode_base(self.base, self.fmt)
        if self.A is not None:
            levels = levels + adapter_levels(self, *round_factors(self.A.detach(), self.B.detach(), self.c)[:2])
        return (levels.round() < self.grid.qmin) | (levels.round() > self.grid.qmax)

    def to(self, dtype: torch.dtype) -> Problem:
        """x, bias and dy rounded to `dtype`; the weight's side stays as it is."""

        def cast(tensor):
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

        return replace(self, x=cast(self.x), bias=cast(self.bias), dy=cast(self.dy))

    def there(self) -> Problem:
        """All of it on `DEVICE`, as leaves again."""
        names = ("x", "base", "scale0", "shift", "zero_point", "A", "B", "bias", "dy")
        tensors = {name: getattr(self, name) for name in names}
        moved = {
            name: tensor.detach().to(DEVICE).requires_grad_(tensor.requires_grad)
            for name, tensor in tensors.items()
            if tensor is not None
        }
        return replace(self, **moved)


def problem(
    bits: int = 4,
    group_size: int | str = -1,
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
        group_size: of the grid, or `BY_CHANNEL`.
        clip: "none"; "few": some, but less than 2 %; "many": more than that.
    """
    grid = Grid(bits, 9 if group_size == BY_CHANNEL else group_size, symmetric)
    weight = torch.randn(rows, cols) * 0.02
    scale, zero = choose_range(weight, grid, "minmax", signed=symmetric)
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
        if group_size == BY_CHANNEL:
            B /= (scale.abs().amax(1, keepdim=True) / scale).abs().amax()
        if clip == "few":
            A[0], B[:, 0] = 0.0, 0.0
            A[0, 1], A[0, cols - 1], B[0, 0], B[rows - 1, 0] = 2.0, -2.0, 2.0**bits, -(2.0**bits)
    x, dy = torch.randn(*shape, cols), torch.randn(*shape, rows)
    shift = torch.randn(len(scale), 1 if group_size == BY_CHANNEL else scale.shape[1]) * 0.1
    made = Problem(x, base, scale, shift, zero, A, B, torch.randn(rows) if bias else None, dy, grid, downcast)
    share = made.clipped().float().mean().item()
    low, high = {"none": (0, 0), "few": (1e-9, 0.02), "many": (0.0201, 0.9)}[clip]
    assert low <= share <= high, f"{share:.3%} of the entries are clipped, which is not what {clip!r} asks for"
    for leaf in made.leaves.values():
        leaf.requires_grad_()
    return made


def adapter_levels(p: Problem, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """What rounded factors add to the levels: B A, or by channel B A t / s0."""
    if p.shift.shape == p.scale0.shape:
        return B @ A
    units = p.scale0.abs().amax(1, keepdim=True) / p.scale0
    return (grouped(B @ A, units) * units.unsqueeze(-1)).view(p.base.shape[0], -1)


def plain_weight(p: Problem, relative: bool = True) -> torch.Tensor:
    """W^, fp32, as the paper writes it: straight-through rounding (of the factors too), clip, scale.

    Args:
        relative: by channel, how snapping the scales is passed through: all of a row as if they had changed by the
            same factor, or each on its own.
    """
    z, scale, passed = decode_base(p.base, p.fmt), p.scale, torch.ones(())
    if relative and p.shift.shape != p.scale0.shape:
        t = p.scale0.abs().amax(1, keepdim=True)
        change = trained_scale(t, p.shift.detach(), "auto") / t
        scale = scale.detach() * (1 + (p.shift - p.shift.detach()) / change)
        passed = (change * p.scale0 / scale.detach()).unsqueeze(-1)
    if p.A is not None:
        A, B = p.A.float(), p.B.float() * p.c
        near_A, near_B = round_factors(p.A.detach(), p.B.detach(), p.c)[:2]
        z = z + adapter_levels(p, A + (near_A - A).detach(), B + (near_B - B).detach())
    z = grouped(z, scale)
    rounded = z.round().detach() + (z - z.detach()) * passed
    levels = rounded.clamp(p.grid.qmin, p.grid.qmax)
    if p.zero_point is not None:
        levels = levels - p.zero_point.unsqueeze(-1).float()
    return (levels * scale.unsqueeze(-1)).view(-1, p.x.shape[-1])


def plain(p: Problem, weight_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The layer with `plain_weight`."""
    return torch.nn.functional.linear(p.x, plain_weight(p).to(weight_dtype), p.bias)


def ours(p: Problem) -> torch.Tensor:
    return quantized_linear(*p.operands)


def gradients(y: torch.Tensor, p: Problem) -> dict[str, torch.Tensor]:
    return dict(zip(p.leaves, torch.autograd.grad(y, list(p.leaves.values()), p.dy), strict=True))


def results(y: torch.Tensor, p: Problem) -> dict[str, torch.Tensor]:
    """An output and its gradients, by name."""
    return {"y": y, **gradients(y, p)}


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str = "", rtol: float = 2e-5) -> None:
    """Equal up to fp32 summation order: the error is measured against the tensor's largest entry."""
    assert found.shape == expected.shape, name
    assert found.dtype == expected.dtype, name
    assert torch.isfinite(found).all(), name
    if found.numel():
        assert (found - expected).abs().max() <= rtol * expected.abs().max() + 1e-7, name


def check(p: Problem) -> None:
    """Output and every gradient are the formula's."""
    found, truth = results(ours(p), p), results(plain(p), p)
    for name, exact in truth.items():
        assert_close(found[name], exact, name)
        assert exact.abs().max() > 0, name


def check_low_precision(low: Problem, slack: float) -> None:
    """Against the formula in fp32, what is ours is off by no more than the formula in low precision.

    Args:
        low: a problem in bf16 or fp16.
        slack: machine epsilons that ours may be worse by.
    """
    exact = low.to(torch.float32)
    truth, usual, found = results(plain(exact), exact), results(plain(low, low.x.dtype), low), results(ours(low), low)
    for name, true in truth.items():
        assert found[name].dtype == usual[name].dtype, name
        ours_off, usual_off = (((v[name].float() - true).norm() / true.norm()).item() for v in (found, usual))
        assert ours_off <= usual_off + slack * torch.finfo(low.x.dtype).eps, name
