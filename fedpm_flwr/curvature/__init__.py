"""What a preconditioner P is. One kind, one file; a new kind is listed in ``KINDS``."""

from .base import Curvature, CurvatureError, Operator
from .dense import Dense
from .diagonal import Diagonal
from .identity import Identity
from .kronecker import Kronecker, KroneckerBasis, mean_factors
from .kronecker_right import KroneckerRight
from .layer import Block, LayerCurvature, from_matrix, matrix_shape, to_matrix
from .low_rank import LowRank
from .spill import Spill
from .sum import Sum, plus, weighted_sum

KINDS: dict[str, type[Curvature]] = {
    kind.kind: kind for kind in (Identity, Diagonal, Dense, KroneckerRight, Kronecker, LowRank)
}
"""The kinds that a client may have for a layer. All but the identity travel."""

__all__ = [
    "KINDS",
    "Block",
    "Curvature",
    "CurvatureError",
    "Dense",
    "Diagonal",
    "Identity",
    "Kronecker",
    "KroneckerBasis",
    "KroneckerRight",
    "LayerCurvature",
    "LowRank",
    "Operator",
    "Spill",
    "Sum",
    "from_matrix",
    "matrix_shape",
    "mean_factors",
    "plus",
    "to_matrix",
    "weighted_sum",
]
