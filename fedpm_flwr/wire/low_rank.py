"""A symmetric matrix as its leading eigenvectors and one number for the rest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.linalg import leading, outer
from .layout import Layout, PartCodec, prefixed, without_prefix
from .values import Constant, Int8Columns, Values

FLOOR, BASIS = "floor", "basis"
_VECTORS = Int8Columns()


@dataclass(frozen=True)
class Spectral:
    """δI + U Uᵀ with uⱼ = vⱼ √(μⱼ − δ): the ``rank`` leading eigenpairs, and δ, the mean of the other eigenvalues.

    δ and not what U Uᵀ leaves of the diagonal: clients' diagonals differ, and weigh a change entry by entry. That
    breaks up the directions in which a change is small because its curvature is large, wherever these are not
    among the vectors sent, and the mixed model may be far from all clients'. Rank 0 is the diagonal all the same.
    """

    rank: int

    def layout(self, shape: tuple[int, ...]) -> Layout:
        if self.rank > shape[-1]:
            raise ValueError(f"a matrix of side {shape[-1]} has no rank {self.rank}")
        found = prefixed(FLOOR, self._floor.layout(shape[:-1]))
        return found | (prefixed(BASIS, _VECTORS.layout((*shape[:-1], self.rank))) if self.rank else {})

    def pack(self, part: Tensor) -> dict[str, Tensor]:
        diagonal = part.diagonal(dim1=-2, dim2=-1).clamp(min=0)
        if not self.rank:
            return prefixed(FLOOR, self._floor.pack(diagonal))
        values, vectors = leading(part, self.rank)
        others = max(part.shape[-1] - self.rank, 1)
        rest = ((diagonal.sum(-1) - values.sum(-1)) / others).clamp(min=0)[..., None]
        # An eigenvector's sign is the library's whim: the largest number of each is to be positive.
        signs = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)).sign()
        basis = vectors * signs * (values - rest).clamp(min=0).sqrt()[..., None, :]
        floor = self._floor.pack(rest.expand(diagonal.shape))
        return prefixed(BASIS, _VECTORS.pack(basis)) | prefixed(FLOOR, floor)

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        matrix = torch.diag_embed(self._floor.unpack(without_prefix(FLOOR, tensors), shape[:-1]))
        if self.rank:
            basis = _VECTORS.unpack(without_prefix(BASIS, tensors), shape)
            matrix = matrix + outer(basis)
        return matrix

    @property
    def _floor(self) -> PartCodec:
        return Constant() if self.rank else Values(torch.bfloat16)
