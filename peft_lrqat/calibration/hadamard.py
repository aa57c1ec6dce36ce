"""Random rotations: orthogonal matrices that spread every vector over all its entries, of any size.

A Hadamard matrix has entries 1 and -1 and orthogonal rows, so that an outlier of size 1 becomes n entries of size
n^-0.5. Q = D H D' / sqrt(n), with random signs on the diagonals of D and D', is as good for any fixed direction as a
random orthogonal matrix, and a product with it takes additions only. D' is for engines that turn values once more by a
Sylvester matrix (llama.cpp, in a quantized KV cache): without D' that would turn them back. Orders are powers of two
(Sylvester), or such a power times an order of Paley's: q + 1 for primes q = 3 modulo 4 and 2 (q + 1) for primes q = 1
modulo 4; so 12, 20, 28, 36, 44, 60 ... Sizes that are none of these get a random orthogonal matrix (the Q of a Gaussian
matrix).

H is kept as the factors of a Kronecker product, so that n = 4096 is multiplied as two times 64.
"""

from __future__ import annotations

import math

import torch

#: The largest power of two that is one factor.
_FACTOR = 64


class Rotation:
    """An orthogonal (size, size) matrix Q, which turns row vectors: x Q.

    Attributes:
        size: of the vectors.
        random_hadamard: whether Q is a Hadamard matrix with random signs; otherwise it is any orthogonal matrix.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        """
        Args:
            generator: on the CPU; of the signs, or of the orthogonal matrix.
        """
        self.size = size
        factors = hadamard_factors(size)
        self.random_hadamard = factors is not None
        if factors is None:
            self._factors = [_random_orthogonal(size, generator)]
            self._signs = torch.ones(2, size, dtype=torch.float64)
        else:
            self._factors = [factor / math.sqrt(len(factor)) for factor in factors]
            self._signs = torch.randint(0, 2, (2, size), generator=generator).double() * 2 - 1

    def __call__(self, x: torch.Tensor, axis: int = -1) -> torch.Tensor:
        """x Q along one axis of a float tensor, in its dtype and on its device.

        The axis may have k * `size` entries; each `size` of them in a row (a head's) are turned on their own.
        """
        moved = x.movedim(axis, -1)
        before, after = self._signs.to(x)
        turned = moved.reshape(-1, self.size) * before
        rest = self.size
        for factor in self._factors:
            rest //= len(factor)
            turned = factor.to(x).t() @ turned.reshape(-1, len(factor), rest) if rest > 1 else (
                turned.reshape(-1, len(factor)) @ factor.to(x)
            )  # fmt: skip
        return (turned.reshape(-1, self.size) * after).reshape(moved.shape).movedim(-1, axis)


def hadamard_factors(size: int) -> list[torch.Tensor] | None:
    """Hadamard matrices whose Kronecker product has order `size`, fp64, entries 1 and -1; None: none is known here."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    order, first = 1, []
    if odd > 1:
        order, found = 4 * odd, None
        while size % order == 0 and (found := _paley(order)) is None:
            order *= 2
        if found is None:
            return None
        first = [found]
    power = size // order
    while power > 1:
        first.append(_sylvester(min(power, _FACTOR)))
        power //= len(first[-1])
    return first


def _sylvester(order: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def _paley(order: int) -> torch.Tensor | None:
    """The Hadamard matrix of this order by one of Paley's constructions over a prime field (1933), or None."""
    if (q := order - 1) % 4 == 3 and _is_prime(q):
        skew = _bordered(q)
        skew[1:, 0] = -1
        return skew + torch.eye(order, dtype=torch.float64)
    if order % 4 == 0 and (q := order // 2 - 1) % 4 == 1 and _is_prime(q):
        both = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(q), both) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)
    return None


def _bordered(q: int) -> torch.Tensor:
    """(q + 1, q + 1): a row and a column of ones around the Legendre symbols (i - j | q); the diagonal is 0."""
    symbol = torch.full((q,), -1.0, dtype=torch.float64)
    symbol[torch.arange(1, q).pow(2) % q] = 1
    symbol[0] = 0
    places = torch.arange(q)
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 0] = 0
    matrix[1:, 1:] = symbol[(places[:, None] - places) % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _random_orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    """fp64, uniform over all orthogonal matrices."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()
