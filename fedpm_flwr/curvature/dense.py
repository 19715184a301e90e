"""P as a full matrix: the exact Hessian of a small model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Curvature, CurvatureError, check_positive_definite, check_square, cholesky_solve
from .identity import Identity


@dataclass(frozen=True, eq=False)
class Dense(Curvature):
    """P = H, symmetric [n, n], on vec(Δ): Δ's rows one after another, n = rows · columns."""

    kind = "dense"
    matrix: Tensor

    def __post_init__(self) -> None:
        check_square(self.matrix, "a dense curvature")

    def matmul(self, delta: Tensor) -> Tensor:
        return (self.matrix @ self._vector(delta)).reshape(delta.shape)

    def solve(self, rhs: Tensor) -> Tensor:
        return cholesky_solve(self.matrix, self._vector(rhs)[:, None]).reshape(rhs.shape)

    def damped(self, damping: float) -> "Dense":
        return Dense(self.matrix + damping * torch.eye(len(self.matrix)).to(self.matrix))

    def scaled(self, factor: float) -> "Dense":
        return Dense(self.matrix * factor)

    def plus(self, other: Curvature) -> "Dense":
        if isinstance(other, Identity):
            return self.damped(other.scale)
        return Dense(self.matrix + other.to_dense(len(self.matrix)).to(self.matrix))

    def to_dense(self, size: int) -> Tensor:
        if size != len(self.matrix):
            raise CurvatureError(f"a dense curvature of side {len(self.matrix)} has no form of side {size}")
        return self.matrix

    def check_positive_definite(self) -> None:
        check_positive_definite(self.matrix)

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "Dense":
        return Dense(self.matrix.to(dtype=dtype, device=device))

    def _vector(self, delta: Tensor) -> Tensor:
        if delta.numel() != len(self.matrix):
            raise CurvatureError(f"a change of {delta.numel()} numbers met a curvature of side {len(self.matrix)}")
        return delta.reshape(-1)
