"""Stacks of experts for the tests of the operations: of each expert the random layer of `tests/problems.py`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from peft_lrqat.ops import expert_linear, expert_weights
from tests.problems import COLS, DEVICE, RANK, ROWS, Problem, assert_close, plain, plain_weight, problem

E = 3
#: Which experts' weights are asked for, and how many tokens each gets.
LISTS = {"all": None, "one": [1], "some": [2, 0], "twice": [2, 2], "none": []}
ROUTES = {"all": (4, 1, 7), "some": (5, 0, 9), "one": (0, 6, 0), "none": (0, 0, 0)}


@dataclass
class Stack:
    """Operands of `expert_weights` as leaf tensors, and the layers that they were made of."""

    base: torch.Tensor
    scale0: torch.Tensor
    shift: torch.Tensor
    zero_point: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    first: Problem
    c: float = 0.7

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        return {"shift": self.shift, "A": self.A, "B": self.B}

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.base, self.scale0, self.shift, self.zero_point, self.A, self.B

    @property
    def shape(self) -> tuple[int, int]:
        """out and in of an expert."""
        return self.base.shape[0] // E, self.A.shape[1]

    @property
    def constants(self) -> tuple:
        return E, self.c, self.first.grid.bits, self.first.downcast, "auto", self.shape[1]

    def expert(self, e: int) -> tuple[torch.Tensor | None, ...]:
        """One expert's tensors, sliced by hand: PEFT's layout of A is expert-major, that of B has the expert last."""
        out, rank = self.shape[0], self.B.shape[1] // E
        rows = slice(e * out, (e + 1) * out)
        per_row = [t if t is None or t.shape[0] == 1 else t[rows] for t in (self.scale0, self.shift, self.zero_point)]
        A = self.A[e * rank : (e + 1) * rank]
        return self.base[rows], *per_row, A, self.B[:, e::E]

    def problem(self, e: int, x: torch.Tensor | None = None) -> Problem:
        """One expert as a layer of its own, with leaves of its own."""
        base, scale0, shift, zero_point, A, B = self.expert(e)
        shift, A, B = (t.detach().clone().requires_grad_() for t in (shift, A, B))
        changed = {"x": self.first.x if x is None else x, "base": base, "scale0": scale0, "shift": shift}
        return replace(self.first, **changed, zero_point=zero_point, A=A, B=B, c=self.c)

    def zeros(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(leaf) for name, leaf in self.leaves.items()}

    def results(self, y: torch.Tensor, grad: torch.Tensor, *x: torch.Tensor) -> dict[str, torch.Tensor]:
        """An output, and the gradients of the leaves and of x."""
        leaves = self.leaves | dict(zip("x", x, strict=False))
        return {"y": y, **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))}

    def add(self, total: dict[str, torch.Tensor], e: int, gradients: dict[str, torch.Tensor]) -> None:
        """Put one expert's gradients where they belong in those of the stack."""
        _, _, shift, _, A, B = replace(self, **{name: total[name] for name in self.leaves}).expert(e)
        for place, name in ((shift, "shift"), (A, "A"), (B, "B")):
            place += gradients[name]

    def there(self) -> Stack:
        """All of it on `DEVICE`, as leaves again."""
        moved = {
            name: t.detach().to(DEVICE).requires_grad_(t.requires_grad)
            for name, t in vars(self).items()
            if isinstance(t, torch.Tensor)
        }
        return replace(self, **moved, first=self.first.there())


def stack(
    bits: int = 4,
    group_size: int | str = -1,
    symmetric: bool = True,
    downcast: str = "fx8",
    *,
    clip: str = "many",
    rows: int = ROWS,
    cols: int = COLS,
) -> Stack:
    """E experts of `rows` by `cols` each, whose codes move and of which some are clipped: see `problem`."""
    of_each = [problem(bits, group_size, symmetric, downcast, clip=clip, rows=rows, cols=cols) for _ in range(E)]

    def joined(name: str) -> torch.Tensor | None:
        parts = [getattr(p, name) for p in of_each]
        if parts[0] is None:
            return None
        return parts[0] if group_size == 0 and name != "base" else torch.cat([t.detach() for t in parts])

    A = torch.cat([p.A.detach() for p in of_each])
    B = torch.stack([p.B.detach() for p in of_each], 2).reshape(rows, RANK * E)
    made = Stack(*(joined(name) for name in ("base", "scale0", "shift", "zero_point")), A, B, of_each[0])
    for name, leaf in made.leaves.items():
        setattr(made, name, leaf.detach().clone().requires_grad_())
    return made


def listed(s: Stack, name: str) -> torch.Tensor | None:
    """Which experts of a stack are asked for, where the stack is."""
    return None if LISTS[name] is None else torch.tensor(LISTS[name], dtype=torch.int64, device=s.base.device)


def weights(s: Stack, experts: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return expert_weights(*s.tensors, experts, *s.constants, dtype)


def check_weights(s: Stack, name: str) -> None:
    """The weights and every gradient are the formula's, expert by expert."""
    experts = listed(s, name)
    which = list(range(E)) if experts is None else experts.tolist()
    found = weights(s, experts)
    grad = torch.randn(found.shape, device=found.device)
    results, truth, expected = s.results(found, grad), s.zeros(), []
    for place, e in enumerate(which):
        p = s.problem(e)
        weight = plain_weight(p)
        expected.append(weight.detach())
        s.add(truth, e, gradients_of(weight, p, grad[place]))
    assert found.shape == (len(which), *s.shape)
    if which:
        assert_close(found, torch.stack(expected), "W")
    for leaf, value in truth.items():
        assert value.any() == bool(which)
        assert_close(results[leaf], value, leaf)


def routed(s: Stack, name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens for the experts: x (T, in), a leaf; where those of each end, (E,); and dL/dy (T, out)."""
    counts = torch.tensor(ROUTES[name])
    out, cols = s.shape
    x, dy = (torch.randn(int(counts.sum()), n).to(s.base.device, dtype) for n in (cols, out))
    return x.requires_grad_(), counts.cumsum(0).int().to(s.base.device), dy


def linear(s: Stack, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    _, *constants, _ = s.constants
    return expert_linear(x, ends, *s.tensors, *constants)


def check_linear(s: Stack, name: str) -> None:
    """The output and every gradient are the formula's, expert by expert."""
    x, ends, dy = routed(s, name)
    found, truth = s.results(linear(s, x, ends), dy, x), s.zeros()
    truth |= {"y": torch.zeros_like(dy), "x": torch.zeros_like(x)}
    for e, tokens in enumerate(tokens_of(ends)):
        p = s.problem(e, x[tokens].detach().requires_grad_())
        y = plain(p)
        truth["y"][tokens] = y.detach()
        gradients = gradients_of(y, p, dy[tokens])
        truth["x"][tokens] = gradients["x"]
        s.add(truth, e, gradients)
    for leaf, value in truth.items():
        assert_close(found[leaf], value, leaf)


def tokens_of(ends: torch.Tensor) -> list[slice]:
    return [slice(*pair) for pair in itertools.pairwise((0, *ends.tolist()))]


def gradients_of(y: torch.Tensor, p: Problem, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of a layer's leaves; 0 where y does not depend on one."""
    leaves = {name: leaf for name, leaf in p.leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(y, list(leaves.values()), grad, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
