"""P diagonal: Sophia, LTDA, Hutchinson; FOOF of an Embedding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Curvature, CurvatureError
from .linalg import promoted

_LEAST, _LARGEST = 1e-100, 1e100


@dataclass(frozen=True, eq=False)
class Diagonal(Curvature):
    """P·Δ = h ⊙ Δ with h [rows or 1, columns or 1]: where it has a 1, all rows, or columns, share a number.

    An Embedding's inputs are one-hot, so its FOOF matrix is exactly diagonal: h is [rows, 1].
    """

    kind = "diagonal"
    positive = frozenset({"values"})
    values: Tensor

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or not self.values.is_floating_point():
            raise CurvatureError(
                f"a diagonal must be floating point [rows or 1, columns or 1], not {self.values.dtype} "
                f"{list(self.values.shape)}"
            )

    def matmul(self, delta: Tensor) -> Tensor:
        self._check(delta)
        delta, values, dtype = promoted(delta, self.values)
        return (values * delta).to(dtype)

    def solve(self, rhs: Tensor) -> Tensor:
        self._check(rhs)
        return self.inverse().matmul(rhs)

    def inverse(self) -> "Diagonal":
        inverse = 1 / self.values
        if not ((self.values > 0) & inverse.isfinite()).all():
            least = float(self.values.min())
            raise CurvatureError(f"a diagonal with the number {least:.3g} is not positive definite")
        return Diagonal(inverse)

    def damped(self, damping: float) -> "Diagonal":
        return Diagonal(self.values + damping)

    def scaled(self, factor: float) -> "Diagonal":
        return Diagonal(self.values * factor)

    def plus_closed(self, other: Curvature) -> Curvature | None:
        return Diagonal(self.values + other.values) if isinstance(other, Diagonal) else None

    def row(self, columns: int) -> Tensor | None:
        """h [columns], where all rows share it; None: they do not."""
        return self.values[0].expand(columns) if len(self.values) == 1 else None

    def diagonal(self, rows: int, columns: int) -> Tensor:
        return self.values.expand(rows, columns)

    def to_dense(self, size: int) -> Tensor:
        rows, columns = self.values.shape
        missing, rest = divmod(size, rows * columns)
        if rest or (missing > 1 and 1 not in (rows, columns)):
            raise CurvatureError(f"a diagonal {[rows, columns]} has no form of side {size}")
        shape = (rows * missing, columns) if rows == 1 and columns > 1 else (rows, columns * missing)
        return torch.diag(self.values.expand(shape).flatten())

    def check_positive_definite(self) -> None:
        least, largest = (float(number) for number in self.values.aminmax())
        if not _LEAST < least <= largest < _LARGEST:
            raise CurvatureError(
                f"a diagonal from {least:.3g} to {largest:.3g}; allowed: {_LEAST:g} to {_LARGEST:g}"
            )

    @classmethod
    def fits(cls, shapes: Mapping[str, Sequence[int]], rows: int, columns: int) -> bool:
        values = shapes["values"]
        return len(values) == 2 and values[0] in (1, rows) and values[1] in (1, columns)

    def _check(self, delta: Tensor) -> None:
        rows, columns = self.values.shape
        if delta.ndim != 2 or rows not in (1, delta.shape[0]) or columns not in (1, delta.shape[1]):
            raise CurvatureError(f"{list(delta.shape)} met a diagonal {[rows, columns]}")
