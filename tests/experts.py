"""Stacks of experts for the tests of the operations: of each expert the random layer of `tests/problems.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tests.problems import COLS, DEVICE, RANK, ROWS, Problem, problem

E = 3


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

    def add(self, total: dict[str, torch.Tensor], e: int, gradients: dict[str, torch.Tensor]) -> None:
        """Put one expert's gradients where they belong in those of the stack."""
        _, _, shift, _, A, B = replace(self, **total).expert(e)
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
