"""P = c·I: the layer is averaged."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Curvature, CurvatureError


@dataclass(frozen=True)
class Identity(Curvature):
    """P = c·I, for a parameter without curvature of its own."""

    kind = "identity"
    scale: float = 1.0

    def matmul(self, delta: Tensor) -> Tensor:
        return self.scale * delta

    def solve(self, rhs: Tensor) -> Tensor:
        self.check_positive_definite()
        return rhs / self.scale

    def damped(self, damping: float) -> "Identity":
        return Identity(self.scale + damping)

    def scaled(self, factor: float) -> "Identity":
        return Identity(self.scale * factor)

    def plus(self, other: Curvature) -> Curvature:
        return other.damped(self.scale)

    def to_dense(self, size: int) -> Tensor:
        return self.scale * torch.eye(size, dtype=torch.float64)

    def check_positive_definite(self) -> None:
        if not self.scale > 0:
            raise CurvatureError(f"{self.scale} times the identity is not positive definite")

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "Identity":
        return self
