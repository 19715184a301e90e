"""P = A ⊗ I, a Kronecker right factor: FOOF."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Curvature, CurvatureError, check_positive_definite, check_square, cholesky_solve
from .dense import Dense
from .identity import Identity


@dataclass(frozen=True, eq=False)
class KroneckerRight(Curvature):
    """P·Δ = ΔA with A symmetric [columns, columns], the same for every row of Δ (Benzing 2022).

    With A = E[x xᵀ] of the layer's inputs this is FOOF; A's unit is a squared activation.
    """

    kind = "kronecker-right"
    factor: Tensor

    def __post_init__(self) -> None:
        check_square(self.factor, "a Kronecker factor")

    def matmul(self, delta: Tensor) -> Tensor:
        self._check_columns(delta)
        return delta @ self.factor

    def solve(self, rhs: Tensor) -> Tensor:
        self._check_columns(rhs)
        return cholesky_solve(self.factor, rhs.T).T

    def damped(self, damping: float) -> "KroneckerRight":
        return KroneckerRight(self.factor + damping * torch.eye(len(self.factor)).to(self.factor))

    def scaled(self, factor: float) -> "KroneckerRight":
        return KroneckerRight(self.factor * factor)

    def plus(self, other: Curvature) -> Curvature:
        if isinstance(other, KroneckerRight):
            self._check_columns(other.factor)
            return KroneckerRight(self.factor + other.factor)
        if isinstance(other, Identity):
            return self.damped(other.scale)
        if isinstance(other, Dense):
            return other.plus(self)
        raise CurvatureError(f"no sum of {self.kind} and {other.kind} is known")

    def to_dense(self, size: int) -> Tensor:
        rows, rest = divmod(size, len(self.factor))
        if rest:
            raise CurvatureError(f"a Kronecker factor of side {len(self.factor)} has no form of side {size}")
        return torch.kron(torch.eye(rows).to(self.factor), self.factor)

    def check_positive_definite(self) -> None:
        check_positive_definite(self.factor)

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "KroneckerRight":
        return KroneckerRight(self.factor.to(dtype=dtype, device=device))

    def _check_columns(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[1] != len(self.factor):
            raise CurvatureError(f"{list(matrix.shape)} met a Kronecker factor of side {len(self.factor)}")
