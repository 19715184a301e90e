"""Sums of preconditioners: Σ wᵢ Pᵢ in the cheapest kind that holds it, else as the list of its terms."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import cast

import torch
from torch import Tensor

from .base import Curvature, CurvatureError, Operator
from .diagonal import Diagonal
from .kronecker import Kronecker, mean_factors
from .linalg import conjugate_gradients

_log = logging.getLogger("flwr")

TOLERANCE = 1e-13
"""How far conjugate gradients go: √(ρᵀM⁻¹ρ / RᵀM⁻¹R) with the residual ρ and the preconditioner M."""
MAX_ITERATIONS = 1000


def plus(first: Curvature, second: Curvature) -> Curvature:
    """P + Q, in the cheapest kind that holds the sum.

    Raises:
        CurvatureError: they do not act on the same Δ.
    """
    for one, other in ((first, second), (second, first)):
        total = one.plus_closed(other)
        if total is not None:
            return total
    return Sum((first,)).plus_closed(second)


def weighted_sum(weights: Sequence[float], curvatures: Sequence[Curvature]) -> Curvature:
    """Σ wᵢ Pᵢ over at least one P."""
    return reduce(plus, (curvature.scaled(w) for w, curvature in zip(weights, curvatures, strict=True)))


@dataclass(frozen=True, eq=False)
class Sum(Curvature):
    """P = Σ Pⱼ that no other kind holds, as of several K-FAC clients: its terms, all kept.

    Solved without a matrix, by conjugate gradients in float64 to ``TOLERANCE``, preconditioned by the
    mean factors where all terms are Kronecker products of the same groups, else by the diagonal.
    """

    kind = "sum"
    terms: tuple[Curvature, ...]

    def matmul(self, delta: Tensor) -> Tensor:
        return sum((term.matmul(delta) for term in self.terms), torch.zeros_like(delta))

    def solve(self, rhs: Tensor) -> Tensor:
        found, reached = conjugate_gradients(
            self.matmul, rhs.double(), self._preconditioner(rhs).matmul, TOLERANCE, MAX_ITERATIONS
        )
        if not reached <= 100 * TOLERANCE:
            _log.warning(
                "%sa sum of %d curvatures is solved to a residual of %s only, after %d iterations",
                *("fedpm | ", len(self.terms), f"{reached:.1g}", MAX_ITERATIONS),
            )
        return found.to(rhs.dtype)

    def _preconditioner(self, rhs: Tensor) -> Operator:
        """The mean factors' inverse, or 1 / diagonal, in float64."""
        kronecker = [term for term in self.terms if isinstance(term, Kronecker)]
        if len(kronecker) == len(self.terms) and len({term.left.shape for term in kronecker}) == 1:
            return reduce(mean_factors, kronecker).to(torch.float64, rhs.device).inverse(clamped=True)
        return Diagonal(self.diagonal(*rhs.shape).to(rhs.device)).inverse()

    def inverse(self) -> Operator:
        raise CurvatureError("a sum of curvatures has no inverse in closed form")

    def damped(self, damping: float) -> "Sum":
        return Sum((self.terms[0].damped(damping), *self.terms[1:]))

    def scaled(self, factor: float) -> "Sum":
        return Sum(tuple(term.scaled(factor) for term in self.terms))

    def plus_closed(self, other: Curvature) -> Curvature:
        """Into the first term that can hold it; else one term more."""
        if isinstance(other, Sum):
            return reduce(plus, other.terms, cast(Curvature, self))
        for place, term in enumerate(self.terms):
            total = term.plus_closed(other) or other.plus_closed(term)
            if total is not None:
                return Sum((*self.terms[:place], total, *self.terms[place + 1 :]))
        return Sum((*self.terms, other))

    def diagonal(self, rows: int, columns: int) -> Tensor:
        return sum(
            (term.diagonal(rows, columns).double() for term in self.terms),
            torch.zeros(rows, columns, dtype=torch.float64),
        )

    def to_dense(self, size: int) -> Tensor:
        return sum((term.to_dense(size).double() for term in self.terms), torch.zeros(size, size).double())

    def check_positive_definite(self) -> None:
        for term in self.terms:
            term.check_positive_definite()

    def map(self, function: Callable[[Tensor], Tensor]) -> "Sum":
        return Sum(tuple(term.map(function) for term in self.terms))

    @classmethod
    def fits(cls, shapes: Mapping[str, Sequence[int]], rows: int, columns: int) -> bool:
        return False  # it does not travel: a client has one P for a layer
