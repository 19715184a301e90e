"""What several test files share."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fedpm_flwr.curvature import Curvature, Dense, Diagonal, Identity, Kronecker, KroneckerRight, LowRank

ROWS, COLUMNS, GROUPS = 6, 4, 2

CODECS = (
    "triangle-float64",
    "triangle-float32",
    "triangle-bfloat16",
    "triangle-int8",
    "positions",
    "diagonal",
    "rank-1",
    "rank-0.9",
    "auto-99",
)
"""One of each sort that the setting ``codec`` may name."""


def spd(side: int, generator: torch.Generator, condition: float = 1e2) -> Tensor:
    """A random symmetric positive definite float64 matrix with this condition number, norm about 1."""
    basis, _ = torch.linalg.qr(torch.randn(side, side, dtype=torch.float64, generator=generator))
    eigenvalues = condition ** -torch.linspace(0, 1, side, dtype=torch.float64)
    matrix: Tensor = (basis * eigenvalues) @ basis.T
    return matrix


def stacked(side: int, generator: torch.Generator, condition: float) -> Tensor:
    return torch.stack([spd(side, generator, condition) for _ in range(GROUPS)])


def diagonal(rows: int, columns: int) -> Callable[[torch.Generator, float], Diagonal]:
    def make(generator: torch.Generator, condition: float) -> Diagonal:
        exponents = torch.linspace(0, 1, rows * columns, dtype=torch.float64)
        order = torch.randperm(rows * columns, generator=generator)
        return Diagonal((condition**-exponents)[order].reshape(rows, columns))

    return make


def kronecker(generator: torch.Generator, condition: float) -> Kronecker:
    return Kronecker(spd(ROWS, generator, condition**0.5), spd(COLUMNS, generator, condition**0.5))


def kronecker_grouped(generator: torch.Generator, condition: float) -> Kronecker:
    half = condition**0.5
    return Kronecker(stacked(ROWS // GROUPS, generator, half), stacked(COLUMNS, generator, half))


def low_rank(generator: torch.Generator, condition: float) -> LowRank:
    floor = torch.rand(COLUMNS, dtype=torch.float64, generator=generator) + 1
    return LowRank(floor / condition, torch.randn(COLUMNS, 1, dtype=torch.float64, generator=generator))


MAKERS: dict[str, Callable[[torch.Generator, float], Curvature]] = {
    "identity": lambda generator, condition: Identity(float(torch.rand((), generator=generator)) + 0.1),
    "diagonal": diagonal(ROWS, COLUMNS),
    "diagonal, a number a row": diagonal(ROWS, 1),
    "diagonal, a number a column": diagonal(1, COLUMNS),
    "dense": lambda generator, condition: Dense(spd(ROWS * COLUMNS, generator, condition)),
    "kronecker-right": lambda generator, condition: KroneckerRight(spd(COLUMNS, generator, condition)),
    "kronecker-right, grouped": lambda generator, condition: KroneckerRight(
        stacked(COLUMNS, generator, condition)
    ),
    "kronecker": kronecker,
    "kronecker, grouped": kronecker_grouped,
    "low-rank": low_rank,
}
"""A random P of each kind and form, acting on [ROWS, COLUMNS]; a new kind adds its line here."""


def random_curvature(form: str, generator: torch.Generator, condition: float = 1e2) -> Curvature:
    return MAKERS[form](generator, condition)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user like the one in the containers; root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
