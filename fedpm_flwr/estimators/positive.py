"""The one rule for estimates that are not positive: P = |H|.

Hutchinson's diagonals, LTDA's, and Hessians of losses that are not convex have negative eigenvalues.
Measurements are averaged with their signs; then each eigenvalue, of a diagonal each entry, is
replaced by its absolute value (saddle-free Newton, Dauphin et al. 2014); damping is added last. So a
direction is stepped by as much as it is curved, whichever way, and always downhill. A matrix that is
positive definite stays as it is to the last bit.
"""

import torch

from ..curvature import Curvature, Dense, Diagonal
from ..curvature.linalg import eigh


def absolute(curvature: Curvature) -> Curvature:
    """|H| for a diagonal or dense H; other kinds are second moments, and positive by construction."""
    match curvature:
        case Diagonal(values=values):
            return Diagonal(values.abs())
        case Dense(matrix=matrix) if torch.isfinite(matrix).all():
            if not torch.linalg.cholesky_ex(matrix)[1].any():
                return curvature
            values, vectors = eigh(matrix)
            return Dense((vectors * values.abs()) @ vectors.mT)
    return curvature
