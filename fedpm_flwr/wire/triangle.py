"""A symmetric matrix as its lower triangle."""

from dataclasses import dataclass

import torch
from torch import Tensor

TRIANGLE = "triangle"


@dataclass(frozen=True)
class Triangle:
    """n(n+1)/2 numbers of ``dtype``: row by row, each row up to and including the diagonal."""

    dtype: torch.dtype

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        rows, columns = torch.tril_indices(*matrix.shape, device=matrix.device)
        return {TRIANGLE: matrix[rows, columns].to("cpu", self.dtype)}

    def unpack(self, tensors: dict[str, Tensor], side: int) -> Tensor:
        if set(tensors) != {TRIANGLE}:
            raise ValueError(f"tensors {sorted(tensors)} where only {TRIANGLE!r} belongs")
        triangle = tensors[TRIANGLE]
        if triangle.shape != (side * (side + 1) // 2,) or triangle.dtype != self.dtype:
            raise ValueError(
                f"{TRIANGLE!r} is {triangle.dtype} {list(triangle.shape)}, "
                f"not {self.dtype} [{side * (side + 1) // 2}] as side {side} needs"
            )
        rows, columns = torch.tril_indices(side, side)
        matrix = torch.empty(side, side, dtype=self.dtype)
        matrix[rows, columns] = triangle
        matrix[columns, rows] = triangle
        return matrix
