"""P = (diag(d) + U Uᵀ) ⊗ I: a Kronecker right factor in few numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Curvature, CurvatureError, Operator
from .diagonal import Diagonal
from .kronecker_right import KroneckerRight
from .linalg import MARGIN, add_to_diagonal, check_trace, cholesky, outer, promoted

_REFINEMENTS = 2


@dataclass(frozen=True, eq=False)
class LowRank(Curvature):
    """P·Δ = Δ(diag(d) + U Uᵀ) with d [columns] and U [columns, rank], the same for every row of Δ.

    Solved by Woodbury's identity: O(columns · rank²), where the full matrix takes O(columns³). A
    sum over clients lines up the U side by side while that is cheaper, and else forms the matrix.
    """

    kind = "low-rank"
    positive = frozenset({"floor"})
    floor: Tensor
    basis: Tensor

    def __post_init__(self) -> None:
        if self.floor.ndim != 1 or self.basis.ndim != 2 or len(self.floor) != len(self.basis):
            raise CurvatureError(
                f"low rank needs d [columns] and U [columns, rank], not {list(self.floor.shape)} and "
                f"{list(self.basis.shape)}"
            )

    def matmul(self, delta: Tensor) -> Tensor:
        self._check(delta)
        delta, basis, dtype = promoted(delta, self.basis)
        return torch.addmm(delta * self.floor.to(basis), delta @ basis, basis.mT).to(dtype)

    def solve(self, rhs: Tensor) -> Tensor:
        """R(D⁻¹ − D⁻¹U (I + UᵀD⁻¹U)⁻¹ UᵀD⁻¹), as long as that is cheaper than A⁻¹.

        The identity loses as many digits as d is smaller than U Uᵀ; two refinements bring them back.
        """
        self._check(rhs)
        if not self._is_low() or not (self.floor > 0).all():
            return self.to_factor().solve(rhs)
        wide, basis, dtype = promoted(rhs, self.basis)
        floor = self.floor.to(basis)
        scaled = basis / floor[:, None]  # D⁻¹U
        lower = cholesky(add_to_diagonal(basis.mT @ scaled, 1.0)).to(basis)
        found = torch.zeros_like(wide)
        for _ in range(1 + _REFINEMENTS):
            residual = wide - self.matmul(found)
            core = torch.cholesky_solve((residual @ scaled).mT, lower).mT
            found = found + residual / floor - core @ scaled.mT
        return found.to(dtype)

    def inverse(self) -> Operator:
        return self.to_factor().inverse()

    def damped(self, damping: float) -> "LowRank":
        return LowRank(self.floor + damping, self.basis)

    def scaled(self, factor: float) -> "LowRank":
        return LowRank(self.floor * factor, self.basis * factor**0.5)

    def plus_closed(self, other: Curvature) -> Curvature | None:
        match other:
            case LowRank(floor=floor, basis=basis):
                self._check(basis.mT)
                total = LowRank(self.floor + floor, torch.cat([self.basis, basis], dim=1))
                return total if total._is_low() else total.to_factor()
            case KroneckerRight(factor=factor) if factor.shape == (len(self.floor),) * 2:
                basis = self.basis.to(factor)
                matrix = torch.addmm(factor, basis, basis.mT)
                matrix.diagonal().add_(self.floor)
                return KroneckerRight(matrix)
            case KroneckerRight():
                return other.plus_closed(self.to_factor())
            case Diagonal() if (row := other.row(len(self.floor))) is not None:
                return LowRank(self.floor + row, self.basis)
        return None

    def to_factor(self) -> KroneckerRight:
        """The same P, as the matrix diag(d) + U Uᵀ."""
        return KroneckerRight(torch.diag(self.floor) + outer(self.basis))

    def diagonal(self, rows: int, columns: int) -> Tensor:
        return (self.floor + self.basis.square().sum(1)).expand(rows, columns)

    def to_dense(self, size: int) -> Tensor:
        return self.to_factor().to_dense(size)

    def check_positive_definite(self) -> None:
        """d is above 100 ε tr(A): then so is the least eigenvalue, and Woodbury's identity is accurate."""
        trace = self.floor.sum() + self.basis.square().sum()
        check_trace(trace[None, None])
        if not float(self.floor.min()) > MARGIN * torch.finfo(self.floor.dtype).eps * float(trace):
            raise CurvatureError(f"a low-rank matrix of side {len(self.floor)} is not positive definite")

    @classmethod
    def side(cls, shapes: Mapping[str, Sequence[int]]) -> int:
        """Of the matrix that a sum may become."""
        return shapes["floor"][0]

    @classmethod
    def fits(cls, shapes: Mapping[str, Sequence[int]], rows: int, columns: int) -> bool:
        floor, basis = list(shapes["floor"]), list(shapes["basis"])
        return floor == [columns] and len(basis) == 2 and basis[0] == columns and 0 < basis[1] <= columns

    def _is_low(self) -> bool:
        return 2 * self.basis.shape[1] <= len(self.floor)

    def _check(self, delta: Tensor) -> None:
        if delta.ndim != 2 or delta.shape[1] != len(self.floor):
            raise CurvatureError(f"{list(delta.shape)} met a low-rank matrix of side {len(self.floor)}")
