"""A symmetric matrix as its lower triangle."""

from dataclasses import dataclass

import torch
from torch import Tensor

TRIANGLE = "triangle"


@dataclass(frozen=True)
class Triangle:
    """n(n+1)/2 numbers of ``dtype``: row by row, each row up to and including the diagonal."""

    dtype: torch.dtype

    def layout(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {TRIANGLE: (self.dtype, (*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))}

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        matrix = matrix.to("cpu", self.dtype)
        return {TRIANGLE: torch.cat([matrix[..., i, : i + 1] for i in range(matrix.shape[-1])], dim=-1)}

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        lower = torch.zeros(shape, dtype=self.dtype)
        for i, row in enumerate(torch.split(tensors[TRIANGLE], list(range(1, shape[-1] + 1)), dim=-1)):
            lower[..., i, : i + 1] = row
        return lower + lower.tril(-1).mT
