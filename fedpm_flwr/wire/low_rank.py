"""A symmetric matrix as its leading eigenvectors and what they leave of its diagonal."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.linalg import leading, outer
from .layout import Layout, prefixed, without_prefix
from .values import Int8Columns, Values

FLOOR, BASIS = "floor", "basis"
_ROUNDS = 10
_POSITIVE, _VECTORS = Values(torch.bfloat16), Int8Columns()


@dataclass(frozen=True)
class Spectral:
    """diag(d) + U Uᵀ, U [n, rank] along the leading eigenvectors; rank 0: the diagonal.

    d is what U Uᵀ, as it arrives, leaves of the diagonal, or 0: positive semidefinite whatever is rounded. The
    length of each column of U is such that along that eigenvector d and U together make its eigenvalue.
    """

    rank: int

    def layout(self, shape: tuple[int, ...]) -> Layout:
        if self.rank > shape[-1]:
            raise ValueError(f"a matrix of side {shape[-1]} has no rank {self.rank}")
        found = prefixed(FLOOR, _POSITIVE.layout(shape[:-1]))
        return found | (prefixed(BASIS, _VECTORS.layout((*shape[:-1], self.rank))) if self.rank else {})

    def pack(self, part: Tensor) -> dict[str, Tensor]:
        return self.pack_pairs(part, *leading(part, self.rank)) if self.rank else self.pack_pairs(part)

    def pack_pairs(
        self, part: Tensor, values: Tensor | None = None, vectors: Tensor | None = None
    ) -> dict[str, Tensor]:
        """With the leading eigenvalues [.., ≥ rank], falling, and eigenvectors [.., n, ≥ rank] known already."""
        floor = part.diagonal(dim1=-2, dim2=-1).cpu()
        found: dict[str, Tensor] = {}
        if self.rank and values is not None and vectors is not None:
            tensors = _VECTORS.pack(_beside_floor(floor, values[..., : self.rank], vectors[..., : self.rank]))
            found = prefixed(BASIS, tensors)
            floor = floor - _VECTORS.unpack(tensors, part.shape).square().sum(-1).to(floor)
        return found | prefixed(FLOOR, _POSITIVE.pack(floor.clamp(min=0)))

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        matrix = torch.diag_embed(_POSITIVE.unpack(without_prefix(FLOOR, tensors), shape[:-1]))
        if self.rank:
            basis = _VECTORS.unpack(without_prefix(BASIS, tensors), shape)
            matrix = matrix + outer(basis)
        return matrix


def _beside_floor(diagonal: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """U [.., n, r]: uⱼ = vⱼ √(μⱼ − vⱼᵀ diag(d) vⱼ), d = diag(A) − Σ uⱼ², by fixed-point iteration."""
    squares, diagonal = vectors.square(), diagonal.to(vectors)
    lengths = values.clamp(min=0)
    for _ in range(_ROUNDS):
        floor = (diagonal - (squares @ lengths[..., None])[..., 0]).clamp(min=0)
        lengths = (values - (squares.mT @ floor[..., None])[..., 0]).clamp(min=0)
    # An eigenvector's sign is the library's whim: the largest number of each is to be positive.
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * largest.sign() * lengths.sqrt()[..., None, :]
