"""P = c·I: the layer is averaged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Curvature, CurvatureError


@dataclass(frozen=True)
class Identity(Curvature):
    """P = c·I, for a parameter without curvature of its own. It does not travel: it is what absence means."""

    kind = "identity"
    scale: float = 1.0

    def matmul(self, delta: Tensor) -> Tensor:
        return self.scale * delta

    def solve(self, rhs: Tensor) -> Tensor:
        self.check_positive_definite()
        return rhs / self.scale

    def inverse(self) -> "Identity":
        self.check_positive_definite()
        return Identity(1 / self.scale)

    def damped(self, damping: float) -> "Identity":
        return Identity(self.scale + damping)

    def scaled(self, factor: float) -> "Identity":
        return Identity(self.scale * factor)

    def plus_closed(self, other: Curvature) -> Curvature:
        return other.damped(self.scale)

    def diagonal(self, rows: int, columns: int) -> Tensor:
        return torch.full((rows, columns), self.scale, dtype=torch.float64)

    def to_dense(self, size: int) -> Tensor:
        return self.scale * torch.eye(size, dtype=torch.float64)

    def check_positive_definite(self) -> None:
        if not self.scale > 0:
            raise CurvatureError(f"{self.scale} times the identity is not positive definite")

    @classmethod
    def fits(cls, shapes: Mapping[str, Sequence[int]], rows: int, columns: int) -> bool:
        return not shapes
