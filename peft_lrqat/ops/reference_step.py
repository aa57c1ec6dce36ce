"""The reference of one AdamW step on packed codes (`LowBitAdamW`), a row chunk at a time.

On a GPU `kernels/low_bit_step.py` does the same, bit for bit, in one launch; `kernels/second_moment.py` sums the norms
of the factored state in another order.

Everything happens in fp32 on the rows at hand; in and out go packed codes and the compact state:

    g  gradient of the weight              q  codes           w = s q
    v = b2 v + (1 - b2) g^2                D = sqrt(v / (1 - b2^t)) + eps
    u = b1 u + (1 - b1) g / D              with error feedback
    m = b1 m + (1 - b1) g,  u = m / D      without: AdamW's
    d = -(eta u / (1 - b1^t) / s + eta0 lambda q)                            the move, in grid steps
    q' = clip(q + floor(d + r))                                              r from `rounding.py`
    e = (clip(q + d) - q') s                                                 what the rounding lost, weight units
    u += (1 - b1^t) (1 - 1/b1) e / eta                                       error feedback (ECO, arXiv 2601.22101)

eta is the learning rate eta0 in weight units, or eta0 |s| with lr_unit="grid", where the learning rate counts grid
steps.
With error feedback the momentum is one of normalized gradients, as LaProp's (arXiv 2002.04839); that is ours. ECO keeps
AdamW's, and in it the remainder times one step's D, which the next step divides by its own: where the gradient
has little noise, the two differ with every flip, and what comes back is biased by more than slow training moves.
The remainder e is taken inside the grid, so that a weight at the end of its range does not wind up a momentum that
points outwards. With eta = 0 nothing moves, and nothing is fed back.

With latent weights (`latent.py`) x = q + k / 64 takes the place of q in these lines, but for the rounding: d moves x,
which goes to the nearest code, and e is what the rounding of k loses, a 64th of a step at most within the range of k.

The 8-bit state. Blocks of 256 neighbours of a row share one number:

    m   int8: a sign and k of 7 bits mean +-k^3 units, of which the block's largest magnitude has 127^3. So neighbours
        of a column with gradients a thousand times theirs keep two digits, and the largest has cells of 2 %. Rounded
        stochastically: a momentum of which a tenth is new each step must not lose small gradients beside a large
        remainder
    v   uint8, the position of r = sqrt(v) below the block's largest, in sixteenths of an octave (four mantissa bits; 16
        octaves), rounded stochastically so that E[r^2] = v:

        r = | sign 0 | exponent, 8 bits | mantissa, 23 bits |      k = upper 13 bits = 16 * exponent + 4 mantissa bits
        stored: k of the block's largest r (int16), and max(0, 255 - (k_largest - k)) of each r (uint8)

The factored state (Adafactor, arXiv 1804.04235) keeps row and column means of v in fp32 instead of v.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import torch

from ..chunks import row_chunks
from ..grid import Grid, grouped, rows_of, with_sign_of
from ..packing import pack, unpack
from ..rounding import poison, random_words, round_stochastically, spare_dither, uniform
from .latent import PARTS, REACH, round_latent

BLOCK = 256
#: A block's largest momentum, in its units.
CUBES = 127**3
#: The smallest normal fp32 number.
SMALLEST = 2.0**-126
#: The momentum's names in the state: of gradients, and of normalized ones.
MOMENTUM, DIRECTION = "exp_avg", "direction"
_V_SHIFT = 19  # fp32 bits below the four mantissa bits
_V_LEVELS = 255


class Rule(NamedTuple):
    """What does not change from step to step.

    Attributes:
        columns: in_features.
        lr_unit: "weight" or "grid".
        state: the kind of second moment, see `new_state`.
        latent_weights: whether the state has latent weights (`latent.py`).
        compile: whether the reference goes through torch.compile.
    """

    grid: Grid
    columns: int
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    error_feedback: bool
    lr_unit: str
    state: str
    latent_weights: bool = False
    compile: bool = False

    @property
    def momentum(self) -> str | None:
        """The momentum's name in the state: `DIRECTION` with error feedback, else `MOMENTUM`; None: there is none."""
        if not self.beta1:
            return None
        return DIRECTION if self.error_feedback else MOMENTUM

    @property
    def scale_follows(self) -> bool:
        """Whether scales follow the latent weights; with a rate in grid steps it would grow with them."""
        return self.latent_weights and self.grid.ternary and self.lr_unit == "weight"


class Corrections(NamedTuple):
    """What a step's number t, from 1, makes of the moments: fp32 scalars on the weight's device.

    Attributes:
        first: 1 - b1^t.
        second: 1 / sqrt(1 - b2^t).
    """

    first: torch.Tensor
    second: torch.Tensor


def corrections_of(rule: Rule, step: float, device: torch.device) -> Corrections:
    """Compute them by torch's powers on the device, which would not round alike elsewhere."""
    t = torch.full((), step, dtype=torch.float32, device=device)
    return Corrections(1 - rule.beta1**t, 1 / _root(1 - rule.beta2**t))


def _root(v: torch.Tensor) -> torch.Tensor:
    """Take the root of fp32 v, rounded once, on every device."""
    # torch's fp32 root on a CPU is not always the nearest, as a GPU's and a kernel's are
    return v.double().sqrt_().float() if v.device.type == "cpu" else v.sqrt()


def _blocks(values: torch.Tensor) -> torch.Tensor:
    """View (rows, columns) as (rows, blocks, BLOCK), padded with zeros."""
    return torch.nn.functional.pad(values, (0, -values.shape[1] % BLOCK)).view(values.shape[0], -1, BLOCK)


def _unblock(blocks: torch.Tensor, columns: int) -> torch.Tensor:
    """Undo `_blocks`: (rows, columns)."""
    return blocks.reshape(blocks.shape[0], -1)[:, :columns]


def encode_momentum(m: torch.Tensor, dither: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Store fp32 m (rows, columns) as int8 (rows, columns), and a unit, fp32 (rows, blocks), for each block.

    Args:
        dither: fp32 (rows, columns), uniform in (0, 1).
    """
    blocks = _blocks(m)
    unit = blocks.abs().amax(dim=-1) * (1 / CUBES)  # a GPU divides by a constant like this; so does every device
    # a unit that is no normal number would have no reciprocal
    size = blocks.abs() * torch.where(unit >= SMALLEST, 1 / unit, 0.0).unsqueeze(-1)
    # a root that may be off by one, which cubes of integers, exact in fp32, put right: so devices agree
    k = torch.exp2(torch.log2(size) * (1 / 3)).floor().clamp(0, 126)
    k = k - (k * k * k > size).float()
    k = (k + ((k + 1) * (k + 1) * (k + 1) <= size).float()).clamp(0, 126)
    below, above = k * k * k, (k + 1) * (k + 1) * (k + 1)
    k = k + (_blocks(dither) * (above - below) < size - below).float()
    codes = torch.where(blocks < 0, -k, k).nan_to_num(nan=0.0)
    return _unblock(codes, m.shape[1]).to(torch.int8), unit


def decode_momentum(codes: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Read what `encode_momentum` stored: fp32 (rows, columns)."""
    k = _blocks(codes.float())
    return _unblock(k * k * k * unit.unsqueeze(-1), codes.shape[1])


def momentum_of_linear_codes(codes: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a linear momentum, as earlier files have it, int8 in fp32 steps (rows, blocks), into `encode_momentum`'s."""
    m = _unblock(_blocks(codes.float()) * step.unsqueeze(-1), codes.shape[1])
    return encode_momentum(m, torch.full_like(m, 0.5))


def encode_second_moment(v: torch.Tensor, dither: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Store fp32 v (rows, columns) as uint8 (rows, columns), and the largest k, int16 (rows, blocks), of each block.

    Args:
        dither: fp32 (rows, columns), uniform in (0, 1).
    """
    low = _root(v).view(torch.int32) >> _V_SHIFT
    below = (low << _V_SHIFT).view(torch.float32).square()
    above = ((low + 1) << _V_SHIFT).view(torch.float32).square()
    k = low + (dither * (above - below) < v - below).to(torch.int32)
    blocks = _blocks(k)
    top = blocks.amax(dim=-1)
    codes = (blocks - top.unsqueeze(-1) + _V_LEVELS).clamp(min=0)
    return _unblock(codes, v.shape[1]).to(torch.uint8), top.to(torch.int16)


def decode_second_moment(codes: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Read what `encode_second_moment` stored: v, fp32 (rows, columns)."""
    k = (_blocks(codes.to(torch.int32)) + top.to(torch.int32).unsqueeze(-1) - _V_LEVELS).clamp(min=0)
    return _unblock((k << _V_SHIFT).view(torch.float32).square(), codes.shape[1])


#: What a state is called -> the tensor of the second moment that it has, and others have not.
SECOND_MOMENT = {"fp32": "exp_avg_sq", "8bit": "exp_avg_sq_codes", "factored": "exp_avg_sq_rows"}


def new_state(shape: torch.Size, kind: str, momentum: str | None, device: torch.device) -> dict[str, torch.Tensor]:
    """Make the state of an (out, in) weight before its first step: zeros, by name.

    Args:
        kind: one of `SECOND_MOMENT`.
        momentum: its name, `Rule.momentum`; None leaves it out.
    """
    rows, columns = shape
    blocks = -(-columns // BLOCK)

    def zeros(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    # on the CPU: who asks for it does not wait for the device
    state = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    if momentum and kind == "fp32":
        state[momentum] = zeros(rows, columns)
    elif momentum:
        state[f"{momentum}_codes"] = zeros(rows, columns, dtype=torch.int8)
        state[f"{momentum}_unit"] = zeros(rows, blocks)
    if kind == "fp32":
        state["exp_avg_sq"] = zeros(rows, columns)
    elif kind == "8bit":
        state["exp_avg_sq_codes"] = zeros(rows, columns, dtype=torch.uint8)
        state["exp_avg_sq_top"] = zeros(rows, blocks, dtype=torch.int16)
    else:
        state["exp_avg_sq_rows"], state["exp_avg_sq_columns"] = zeros(rows, 1), zeros(1, columns)
        state["exp_avg_sq_mean"] = zeros()
    return state


def update_rows(
    packed: torch.Tensor,
    scale: torch.Tensor,
    stream: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, torch.Tensor],
    row: torch.Tensor,
    lr: torch.Tensor,
    corrections: Corrections,
    rule: Rule,
    scale_before: torch.Tensor | None = None,
) -> None:
    """Update some rows in place: the formulas above.

    Args:
        packed: int32 (n, words). Updated.
        scale: fp32 (n or 1, groups); NaN afterwards if the gradient is not finite.
        stream: int64 (2,), key and step of the random numbers.
        grad: (n, in), any float dtype.
        state: the rows of `new_state`'s tensors, by name. Updated, except the factored second moment, which the caller
            keeps.
        row: int64 (n,), row numbers.
        lr: fp32 scalar.
        corrections: of this step.
        scale_before: fp32 (n or 1, groups), see `low_bit_update`.
    """
    grad = grad.float()
    words = random_words(row, rule.columns, stream[1], stream[0])
    denominator = _denominator(state, grad, words, corrections, rule)
    momentum, pace = _read_momentum(state, rule.momentum), lr
    if momentum is None:
        adam = grad / denominator
    else:
        pace = lr / corrections.first
        new = grad / denominator if rule.error_feedback else grad
        momentum = momentum * rule.beta1 + new * (1 - rule.beta1)
        adam = momentum if rule.error_feedback else momentum / denominator

    codes = unpack(packed, rule.grid.code_bits, rule.columns).float()
    latent = state.get("latent_codes")
    here = codes if latent is None else codes + latent.float() * (1 / PARTS)
    step_size = (scale if scale_before is None else scale_before).unsqueeze(-1)
    pace = with_sign_of(step_size, pace) if rule.lr_unit == "grid" else pace / step_size
    adam = (grouped(adam, scale) * pace).reshape_as(codes)
    move = -(adam + lr * rule.weight_decay * here)
    target = here + move
    if latent is None:
        rounded = round_stochastically(codes, move, uniform(words), rule.grid)
        reach, kept = 0.0, rounded
    else:
        if scale_before is not None:
            target = (grouped(target, scale) * (step_size / scale.unsqueeze(-1))).reshape_as(codes)
            step_size = scale.unsqueeze(-1)
        rounded, left = round_latent(codes, target, uniform(words), rule.grid)
        latent.copy_(left)
        reach, kept = REACH, rounded + left * (1 / PARTS)

    if rule.error_feedback and momentum is not None:
        lost = target.clamp(rule.grid.qmin - reach, rule.grid.qmax + reach) - kept
        factor = corrections.first * (1 - 1 / rule.beta1) / torch.where(lr > 0, lr, torch.inf)
        factor = with_sign_of(step_size, factor) if rule.lr_unit == "grid" else factor * step_size
        momentum = momentum + (grouped(lost, scale) * factor).reshape_as(codes)
    _write_momentum(state, rule.momentum, momentum, spare_dither(words, 4, 5))
    packed.copy_(pack(rounded.to(torch.int8), rule.grid.code_bits))
    poison(scale, move)


def _read_momentum(state: dict[str, torch.Tensor], name: str | None) -> torch.Tensor | None:
    if name is None or name in state:
        return None if name is None else state[name]
    return decode_momentum(state[f"{name}_codes"], state[f"{name}_unit"])


def _write_momentum(
    state: dict[str, torch.Tensor], name: str | None, momentum: torch.Tensor | None, dither: torch.Tensor
) -> None:
    if momentum is None or name is None:
        return
    if name in state:
        state[name].copy_(momentum)
    else:
        codes, unit = encode_momentum(momentum, dither)
        state[f"{name}_codes"].copy_(codes)
        state[f"{name}_unit"].copy_(unit)


def _denominator(
    state: dict[str, torch.Tensor], grad: torch.Tensor, words: torch.Tensor, corrections: Corrections, rule: Rule
) -> torch.Tensor:
    """Take the gradient into the second moment, and return D: fp32 (n, in). The caller has updated a factored one."""
    if rule.state == "factored":
        return _factored_root(state, corrections) + rule.eps
    square = grad.square() * (1 - rule.beta2)
    if rule.state == "fp32":
        v = state["exp_avg_sq"].mul_(rule.beta2).add_(square)
    else:
        v = decode_second_moment(state["exp_avg_sq_codes"], state["exp_avg_sq_top"]) * rule.beta2 + square
        codes, top = encode_second_moment(v, spare_dither(words, 0, 4))
        state["exp_avg_sq_codes"].copy_(codes)
        state["exp_avg_sq_top"].copy_(top)
    return _root(v) * corrections.second + rule.eps


def _factored_root(state: dict[str, torch.Tensor], corrections: Corrections) -> torch.Tensor:
    """Take the root of the corrected second moment as the product of one of rows and one of columns: no element needs
    a root or a quotient of its own."""
    of_rows = _root(state["exp_avg_sq_rows"] / state["exp_avg_sq_mean"]) * corrections.second
    return of_rows * _root(state["exp_avg_sq_columns"])


@torch.no_grad()
def settle_momentum(state: dict[str, torch.Tensor], rule: Rule) -> None:
    """Turn the momentum into the one that the rule wants, if it is the other: of normalized gradients, or not.

    So `error_feedback` can be switched in training, and states of earlier versions, whose momentum was of gradients
    with error feedback too, go on as they were. What is stored in 8 bits is rounded once more. A momentum that there
    was not, with `betas` of (0, ...), begins at 0.
    """
    if rule.momentum is None or _has_momentum(state, rule.momentum):
        return
    other = MOMENTUM if rule.momentum == DIRECTION else DIRECTION
    v = state[SECOND_MOMENT[rule.state]]
    new = new_state(torch.Size((v.shape[0], rule.columns)), rule.state, rule.momentum, v.device)
    state |= {name: new[name] for name in _momentum_names(rule.momentum) if name in new}
    if not _has_momentum(state, other):
        return
    momentum = cast(torch.Tensor, _read_momentum(state, other))
    if step := float(state["step"]):
        corrections = corrections_of(rule, step, momentum.device)
        if rule.state == "factored":
            root = _factored_root(state, corrections)
        elif rule.state == "fp32":
            root = _root(state["exp_avg_sq"]) * corrections.second
        else:
            root = decode_second_moment(state["exp_avg_sq_codes"], state["exp_avg_sq_top"]).sqrt() * corrections.second
        momentum = momentum / (root + rule.eps) if other == MOMENTUM else momentum * (root + rule.eps)
    for name in _momentum_names(other):
        state.pop(name, None)
    _write_momentum(state, rule.momentum, momentum, torch.full_like(momentum, 0.5))


def _has_momentum(state: dict[str, torch.Tensor], name: str) -> bool:
    return name in state or f"{name}_codes" in state


def _momentum_names(name: str) -> tuple[str, ...]:
    return name, f"{name}_codes", f"{name}_unit"


#: The factored second moment: means of rows, means of columns, and the mean of both.
FACTORS = ("exp_avg_sq_rows", "exp_avg_sq_columns", "exp_avg_sq_mean")


def update_factors(state: dict[str, torch.Tensor], grad: torch.Tensor, beta2: float) -> torch.Tensor:
    """Take the row and column means of g^2 into the factored second moment.

    Args:
        grad: (out, in), any float dtype.

    Returns:
        The norms of the gradient's rows: fp32 (out, 1).
    """
    # a norm reads the gradient once and makes no squares of its size
    norms = [torch.linalg.vector_norm(grad, dim=dim, keepdim=True, dtype=torch.float32) for dim in (1, 0)]
    for name, dim, norm in zip(FACTORS, (1, 0), norms, strict=False):
        # every operation is rounded on its own, as the kernel's are
        state[name].mul_(beta2).add_((1 - beta2) * 1e-30).add_(norm.square() * ((1 - beta2) / grad.shape[dim]))
    state["exp_avg_sq_mean"] = state["exp_avg_sq_rows"].mean()
    return norms[0]


# -- the whole weight

_OF_ALL_ROWS = FACTORS[1:]


@functools.cache
def _compiled() -> Callable[..., None]:
    return torch.compile(update_rows, dynamic=False)


def _compiles_well(state: dict[str, torch.Tensor], rule: Rule) -> bool:
    """Tell whether `_compiled` computes what `update_rows` does.

    What torch 2.13 makes of it on a CPU reads the unit of a row's last block before it is written, where the block is
    padded and not the only one: other numbers in these columns, or none.
    """
    in_blocks = any(name in state for name in (f"{MOMENTUM}_unit", f"{DIRECTION}_unit", "exp_avg_sq_top"))
    return not in_blocks or rule.columns < BLOCK or rule.columns % BLOCK == 0


def low_bit_update(
    packed: torch.Tensor,
    scale: torch.Tensor,
    stream: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, torch.Tensor],
    lr: torch.Tensor,
    corrections: Corrections,
    rule: Rule,
    scale_before: torch.Tensor | None = None,
    norms: bool = False,
) -> torch.Tensor | None:
    """Update a weight in place: the reference of `kernels.low_bit_update`.

    Args:
        packed: int32 (out, words). Updated.
        scale: fp32 (out or 1, groups). Where an update was not finite, those of its row chunk are NaN afterwards.
        stream: int64 (2,), key and step of the random numbers. The latter moves on by one.
        grad: (out, in), any float dtype.
        state: the tensors of `new_state`, by name. Updated, except the factored second moment, which the caller keeps.
        lr: fp32 scalar.
        corrections: of this step.
        scale_before: fp32, as `scale`: what the codes and latent weights are multiples of until this step, where that
            is not `scale` (with latent weights only).
        norms: whether to return norms.

    Returns:
        fp32, norms of parts of the gradient, whose norm is the gradient's; None without `norms`.
    """
    update = _compiled() if rule.compile and _compiles_well(state, rule) else update_rows
    numbers = torch.arange(packed.shape[0], device=packed.device)
    parts = {name: value for name, value in state.items() if name not in ("step", "latent_start")}
    for rows in row_chunks(packed.shape[0], rule.columns, packed.device):
        some = {name: value if name in _OF_ALL_ROWS else value[rows] for name, value in parts.items()}
        constants = (lr, corrections, rule, rows_of(scale_before, rows))
        update(packed[rows], rows_of(scale, rows), stream, grad[rows], some, numbers[rows], *constants)
    stream[1].add_(1)  # `+= 1` would be copied to where it is
    return torch.linalg.vector_norm(grad, dtype=torch.float32) if norms else None
