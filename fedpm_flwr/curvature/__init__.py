"""What a preconditioner P is. One kind, one file; a new kind is listed in ``KINDS``."""

from .base import Curvature, CurvatureError, weighted_sum
from .dense import Dense
from .identity import Identity
from .kronecker import KroneckerRight
from .layer import Block, LayerCurvature, from_matrix, to_matrix

KINDS: dict[str, type[Curvature]] = {kind.kind: kind for kind in (Identity, Dense, KroneckerRight)}

__all__ = [
    "KINDS",
    "Block",
    "Curvature",
    "CurvatureError",
    "Dense",
    "Identity",
    "KroneckerRight",
    "LayerCurvature",
    "from_matrix",
    "to_matrix",
    "weighted_sum",
]
