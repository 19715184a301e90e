"""P = A ⊗ I, a Kronecker right factor: FOOF."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Curvature, CurvatureError
from .diagonal import Diagonal
from .linalg import (
    add_to_diagonal,
    block_diagonal,
    check_positive_definite,
    check_square,
    cholesky_inverse,
    cholesky_solve,
    grouped,
    promoted,
    stack,
)


@dataclass(frozen=True, eq=False)
class KroneckerRight(Curvature):
    """P·Δ = ΔA with A symmetric [columns, columns], the same for every row of Δ (Benzing 2022).

    With A = E[x xᵀ] of the layer's inputs this is FOOF; A's unit is a squared activation. Where
    groups of rows have inputs of their own, as in a grouped convolution, A is [groups, columns,
    columns], and the first rows / groups rows belong to its first matrix.
    """

    kind = "kronecker-right"
    symmetric = frozenset({"factor"})
    factor: Tensor

    def __post_init__(self) -> None:
        check_square(self.factor, "a Kronecker factor")

    def matmul(self, delta: Tensor) -> Tensor:
        self._check(delta)
        delta, factor, dtype = promoted(delta, self.factor)
        return (grouped(delta, factor) @ factor).reshape(delta.shape).to(dtype)

    def solve(self, rhs: Tensor) -> Tensor:
        self._check(rhs)
        return cholesky_solve(self.factor, grouped(rhs, self.factor).mT).mT.reshape(rhs.shape)

    def inverse(self) -> "KroneckerRight":
        return KroneckerRight(cholesky_inverse(self.factor))

    def damped(self, damping: float) -> "KroneckerRight":
        return KroneckerRight(add_to_diagonal(self.factor, damping))

    def scaled(self, factor: float) -> "KroneckerRight":
        return KroneckerRight(self.factor * factor)

    def plus_closed(self, other: Curvature) -> Curvature | None:
        side = self.factor.shape[-1]
        if isinstance(other, Diagonal) and (row := other.row(side)) is not None:
            return KroneckerRight(self.factor + torch.diag(row))
        if not isinstance(other, KroneckerRight):
            return None
        if other.factor.shape[-1] != side:
            raise CurvatureError(f"{list(other.factor.shape)} met a Kronecker factor of side {side}")
        if 1 not in (groups := (len(stack(self.factor)), len(stack(other.factor)))) and groups[0] != groups[1]:
            return None  # of different groupings
        return KroneckerRight(self.factor + other.factor)

    def diagonal(self, rows: int, columns: int) -> Tensor:
        each = self.factor.diagonal(dim1=-2, dim2=-1).reshape(-1, 1, columns)
        return each.expand(-1, rows // len(each), -1).reshape(rows, columns)

    def to_dense(self, size: int) -> Tensor:
        rows, rest = divmod(size, self.factor.shape[-1])
        factors = stack(self.factor)
        if rest or rows % len(factors):
            raise CurvatureError(f"a Kronecker factor of side {self.factor.shape[-1]} has no form of side {size}")
        return block_diagonal(factors.repeat_interleave(rows // len(factors), dim=0))

    def check_positive_definite(self) -> None:
        check_positive_definite(self.factor)

    @classmethod
    def fits(cls, shapes: Mapping[str, Sequence[int]], rows: int, columns: int) -> bool:
        factor = list(shapes["factor"])
        groups = factor[0] if len(factor) == 3 else 1
        return len(factor) in (2, 3) and factor[-2:] == [columns, columns] and rows % groups == 0

    def _check(self, matrix: Tensor) -> None:
        groups = len(stack(self.factor))
        if matrix.ndim != 2 or matrix.shape[1] != self.factor.shape[-1] or matrix.shape[0] % groups:
            raise CurvatureError(
                f"{list(matrix.shape)} met a Kronecker factor of side {self.factor.shape[-1]}"
                + (f" in {groups} groups" if groups > 1 else "")
            )
