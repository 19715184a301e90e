"""How one symmetric matrix becomes named tensors. A new codec is listed in ``CODECS``."""

from typing import Protocol

import torch
from torch import Tensor

from .triangle import Triangle


class Codec(Protocol):
    """A symmetric matrix [n, n] to named tensors and back."""

    def layout(self, side: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The dtype and shape of each tensor that stands for a matrix of this side."""

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for the matrix, on the CPU."""

    def unpack(self, tensors: dict[str, Tensor], side: int) -> Tensor:
        """The matrix [side, side] again, from tensors of this ``layout``."""


CODECS: dict[str, Codec] = {
    "triangle-float32": Triangle(torch.float32),
    "triangle-float64": Triangle(torch.float64),
}


def get_codec(name: str) -> Codec:
    """The codec of this name.

    Raises:
        ValueError: naming it and those there are.
    """
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}; allowed: {', '.join(CODECS)}")
    return CODECS[name]
