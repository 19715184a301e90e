"""A symmetric matrix as its lower triangle."""

from dataclasses import dataclass

import torch
from torch import Tensor

TRIANGLE = "triangle"


@dataclass(frozen=True)
class Triangle:
    """n(n+1)/2 numbers of ``dtype``: row by row, each row up to and including the diagonal."""

    dtype: torch.dtype

    def layout(self, side: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {TRIANGLE: (self.dtype, (side * (side + 1) // 2,))}

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        matrix = matrix.to("cpu", self.dtype)
        return {TRIANGLE: torch.cat([row[: i + 1] for i, row in enumerate(matrix)])}

    def unpack(self, tensors: dict[str, Tensor], side: int) -> Tensor:
        lower = torch.zeros(side, side, dtype=self.dtype)
        for i, row in enumerate(torch.split(tensors[TRIANGLE], list(range(1, side + 1)))):
            lower[i, : i + 1] = row
        return lower + lower.tril(-1).T
