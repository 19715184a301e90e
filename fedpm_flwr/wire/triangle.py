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
    return matrix.masked_select(_lower(matrix.shape[-1])).reshape(triangle_shape(tuple(matrix.shape)))


def from_triangle(triangle: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The lower triangular matrix [.., n, n] again."""
    return torch.zeros(shape, dtype=triangle.dtype).masked_scatter_(_lower(shape[-1]), triangle)


def _lower(side: int) -> Tensor:
    """Whether an entry is on or below the diagonal: a byte each, where indices would take 16."""
    return torch.ones(side, side, dtype=torch.bool).tril()
