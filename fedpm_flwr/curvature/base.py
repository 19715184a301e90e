"""The interface of every preconditioner P, and the linear algebra they share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

_MAX_TRACE = 1e100
_MARGIN = 100.0


class CurvatureError(ValueError):
    """A curvature is not positive definite, not finite, or of the wrong size."""


class Curvature(ABC):
    """A symmetric positive semidefinite P that acts on a layer's change Δ, a matrix [rows, columns].

    Immutable: every operation returns a new object.
    """

    kind: ClassVar[str]
    """The name under which the wire format knows this class."""

    @abstractmethod
    def matmul(self, delta: Tensor) -> Tensor:
        """P·Δ, [rows, columns] -> [rows, columns]."""

    @abstractmethod
    def solve(self, rhs: Tensor) -> Tensor:
        """P⁻¹·R, [rows, columns] -> [rows, columns].

        Raises:
            CurvatureError: P is not positive definite.
        """

    @abstractmethod
    def damped(self, damping: float) -> "Curvature":
        """P + λI."""

    @abstractmethod
    def scaled(self, factor: float) -> "Curvature":
        """c·P."""

    @abstractmethod
    def plus(self, other: "Curvature") -> "Curvature":
        """P + Q, in the cheapest kind that holds the sum."""

    @abstractmethod
    def to_dense(self, size: int) -> Tensor:
        """P as a matrix [size, size] on vec(Δ), rows of Δ one after another; size = rows · columns."""

    @abstractmethod
    def check_positive_definite(self) -> None:
        """Whether P may be summed with others and the sum inverted.

        Raises:
            CurvatureError: P is indefinite, or singular as far as its dtype can tell.
        """

    @abstractmethod
    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "Curvature":
        """P with its tensors of this dtype, on this device."""


def weighted_sum(weights: Sequence[float], curvatures: Sequence[Curvature]) -> Curvature:
    """Σ wᵢ Pᵢ over at least one P."""
    total = curvatures[0].scaled(weights[0])
    for weight, curvature in zip(weights[1:], curvatures[1:], strict=True):
        total = total.plus(curvature.scaled(weight))
    return total


def cholesky(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor of a symmetric [n, n] matrix.

    Computed in float32 at least. A matrix that fails in float32 is tried once more in float64, and
    the factor is then float64.

    Raises:
        CurvatureError: the matrix is not positive definite.
    """
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(matrix)
    if info.any() and matrix.dtype != torch.float64:
        lower, info = torch.linalg.cholesky_ex(matrix.double())
    if info.any() or not torch.isfinite(lower).all():
        raise CurvatureError(f"a matrix of side {matrix.shape[-1]} is not positive definite")
    return lower


def cholesky_solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """M⁻¹·R for a symmetric positive definite M [n, n] and R [n, k], in R's dtype."""
    lower = cholesky(matrix)
    return torch.cholesky_solve(rhs.to(lower.dtype), lower).to(rhs.dtype)


def check_positive_definite(matrix: Tensor) -> None:
    """Raise CurvatureError unless the least eigenvalue is above 100 ε tr(M), and tr(M) of a size to compute with.

    The margin adds up: a sum of matrices that have it has it too, so that one matrix on the edge
    cannot make the sum of all singular.
    """
    trace = float(matrix.diagonal().sum())
    if not 1 / _MAX_TRACE < trace < _MAX_TRACE:
        raise CurvatureError(f"a matrix of trace {trace:.3g}; allowed: {1 / _MAX_TRACE:g} to {_MAX_TRACE:g}")
    margin = _MARGIN * torch.finfo(matrix.dtype).eps * trace
    cholesky(matrix - margin * torch.eye(len(matrix)).to(matrix))


def check_square(matrix: Tensor, name: str) -> None:
    """Raise CurvatureError unless the matrix is [n, n] and floating point."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.is_floating_point():
        raise CurvatureError(
            f"{name} must be a square floating-point matrix, not {matrix.dtype} {list(matrix.shape)}"
        )
