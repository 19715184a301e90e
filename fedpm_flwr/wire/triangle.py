"""A symmetric matrix as its lower triangle, in full precision."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Layout

TRIANGLE = "triangle"


@dataclass(frozen=True)
class Triangle:
    """n(n+1)/2 numbers of ``dtype``: row by row, each row up to and including the diagonal."""

    dtype: torch.dtype

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return {TRIANGLE: (self.dtype, triangle_shape(shape))}

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        return {TRIANGLE: to_triangle(matrix.to("cpu", self.dtype))}

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        lower = from_triangle(tensors[TRIANGLE], shape)
        return lower + lower.tril(-1).mT


def triangle_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the triangle of matrices [.., n, n]: [.., n(n+1)/2]."""
    return (*shape[:-2], shape[-1] * (shape[-1] + 1) // 2)


def to_triangle(matrix: Tensor) -> Tensor:
    """The rows of [.., n, n] up to and including the diagonal, one after another."""
    return torch.cat([matrix[..., i, : i + 1] for i in range(matrix.shape[-1])], dim=-1)


def from_triangle(triangle: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The lower triangular matrix [.., n, n] again."""
    lower = torch.zeros(shape, dtype=triangle.dtype)
    for i, row in enumerate(torch.split(triangle, list(range(1, shape[-1] + 1)), dim=-1)):
        lower[..., i, : i + 1] = row
    return lower
