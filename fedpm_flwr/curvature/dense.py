"""P as a full matrix: the exact Hessian of a small model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import Curvature, CurvatureError
from .identity import Identity
from .linalg import (
    add_to_diagonal,
    check_positive_definite,
    check_square,
    cholesky_inverse,
    cholesky_solve,
    promoted,
)


@dataclass(frozen=True, eq=False)
class Dense(Curvature):
    """P = H, symmetric [n, n], on vec(Δ): Δ's rows one after another, n = rows · columns."""

    kind = "dense"
    symmetric = frozenset({"matrix"})
    matrix: Tensor

    def __post_init__(self) -> None:
        check_square(self.matrix, "a dense curvature", stacks=False)

    def matmul(self, delta: Tensor) -> Tensor:
        vector, matrix, dtype = promoted(self._vector(delta), self.matrix)
        return (matrix @ vector).reshape(delta.shape).to(dtype)

    def solve(self, rhs: Tensor) -> Tensor:
        return cholesky_solve(self.matrix, self._vector(rhs)[:, None]).reshape(rhs.shape)

    def inverse(self) -> "Dense":
        return Dense(cholesky_inverse(self.matrix))

    def damped(self, damping: float) -> "Dense":
        return Dense(add_to_diagonal(self.matrix, damping))

    def scaled(self, factor: float) -> "Dense":
        return Dense(self.matrix * factor)

    def plus_closed(self, other: Curvature) -> Curvature:
        if isinstance(other, Identity):
            return self.damped(other.scale)
        return Dense(self.matrix + other.to_dense(len(self.matrix)).to(self.matrix))

    def diagonal(self, rows: int, columns: int) -> Tensor:
        return self.matrix.diagonal().reshape(rows, columns)

    def to_dense(self, size: int) -> Tensor:
        if size != len(self.matrix):
            raise CurvatureError(f"a dense curvature of side {len(self.matrix)} has no form of side {size}")
        return self.matrix

    def check_positive_definite(self) -> None:
        check_positive_definite(self.matrix)

    @classmethod
    def fits(cls, shapes: Mapping[str, Sequence[int]], rows: int, columns: int) -> bool:
        return list(shapes["matrix"]) == [rows * columns] * 2

    def _vector(self, delta: Tensor) -> Tensor:
        if delta.numel() != len(self.matrix):
            raise CurvatureError(f"a change of {delta.numel()} numbers met a curvature of side {len(self.matrix)}")
        return delta.reshape(-1)
