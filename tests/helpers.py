"""What several test files share."""

import torch
from torch import Tensor

from fedpm_flwr.curvature import Curvature, Dense, Identity, KroneckerRight

ROWS, COLUMNS = 3, 4


def spd(side: int, generator: torch.Generator, condition: float = 1e2) -> Tensor:
    """A random symmetric positive definite float64 matrix with this condition number, norm about 1."""
    basis, _ = torch.linalg.qr(torch.randn(side, side, dtype=torch.float64, generator=generator))
    eigenvalues = condition ** -torch.linspace(0, 1, side, dtype=torch.float64)
    matrix: Tensor = (basis * eigenvalues) @ basis.T
    return matrix


def identity(generator: torch.Generator, condition: float) -> Identity:
    return Identity(float(torch.rand((), generator=generator)) + 0.1)


def dense(generator: torch.Generator, condition: float) -> Dense:
    return Dense(spd(ROWS * COLUMNS, generator, condition))


def kronecker_right(generator: torch.Generator, condition: float) -> KroneckerRight:
    return KroneckerRight(spd(COLUMNS, generator, condition))


MAKERS = {Identity.kind: identity, Dense.kind: dense, KroneckerRight.kind: kronecker_right}
"""A random P of each kind, acting on [ROWS, COLUMNS]; a new kind adds its line here."""


def random_curvature(kind: str, generator: torch.Generator, condition: float = 1e2) -> Curvature:
    return MAKERS[kind](generator, condition)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))
