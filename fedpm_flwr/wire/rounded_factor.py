"""A positive semidefinite matrix in few bits that stays so: as its rounded Cholesky factor.

Rounding A itself to 8 bits makes it indefinite, by −0.14 of its unit diagonal at side 2,304. Here
A = S L Lᵀ S with S² = diag(A), so that the rows of L have norm 1; each row of L is rounded to whole numbers q, or
bfloat16, and read as Â = (T q)(T q)ᵀ, T diagonal with T q qᵀ T = diag(A): whatever q is, Â is positive
semidefinite, and has A's diagonal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.linalg import at_least_float32, outer
from .layout import Layout
from .triangle import from_triangle, to_triangle, triangle_shape
from .values import LARGEST, SCALE

ROWS = "rows"
_MAX_ATTEMPTS = 12


@dataclass(frozen=True)
class RoundedFactor:
    """q as a triangle of ``dtype``, int8 or bfloat16, and T, [n]."""

    dtype: torch.dtype

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return {ROWS: (self.dtype, triangle_shape(shape)), SCALE: (torch.float32, shape[:-1])}

    def pack(self, part: Tensor) -> dict[str, Tensor]:
        matrix = part.detach()
        roots = matrix.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().float()
        q = unit_cholesky(matrix)
        if self.dtype == torch.int8:
            q = (q * (LARGEST / q.abs().amax(-1, keepdim=True))).round()
            # Not 0: then Â is as definite as A was.
            q.diagonal(dim1=-2, dim2=-1).clamp_(min=1)
        q = q.to(self.dtype)
        return {ROWS: to_triangle(q.cpu()), SCALE: (roots / q.float().norm(dim=-1)).cpu()}

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        lower = from_triangle(tensors[ROWS].float(), shape) * tensors[SCALE][..., None]
        return outer(lower)


def unit_cholesky(matrix: Tensor) -> Tensor:
    """L with A = S L Lᵀ S, S² = diag(A), in float32; eigenvalues within rounding of 0, or below, are raised.

    Rows and columns whose diagonal is 0 count as those of the identity.
    """
    matrix = at_least_float32(matrix)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    roots = diagonal.clamp(min=0).sqrt()
    inverse = torch.where(roots > 0, 1 / roots, 0.0)
    unit = (inverse[..., :, None] * matrix * inverse[..., None, :]).float()
    unit.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    side = matrix.shape[-1]
    raised = 0.0
    for attempt in range(_MAX_ATTEMPTS):
        lower, info = torch.linalg.cholesky_ex(unit)
        if not info.any():
            normed: Tensor = lower / lower.norm(dim=-1, keepdim=True)
            return normed
        new = min(torch.finfo(torch.float32).eps * side * 10.0**attempt, 1.0 * side)
        unit.diagonal(dim1=-2, dim2=-1).add_(new - raised)
        raised = new
    raise ValueError(f"a matrix of side {side} is not finite, or far from positive semidefinite")
