"""Symmetric matrices made smaller for the wire, by name: what FedNL calls C."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.linalg import eigh
from ..replies import ReplyError
from .vectors import lower_triangle, symmetric

Tensors = dict[str, Tensor]
PLACES = "places"
_EXACT_IN_FLOAT32 = 2**24


@dataclass(frozen=True)
class Compressor:
    """Three functions, each of a size (R or K) that means the same on both sides.

    ``compress(D, size)``: the tensors that travel for a symmetric D [d, d].
    ``shapes(d, size)``: their shapes.
    ``restore(tensors, d)``: C(D), [d, d], symmetric; raises ReplyError if these are no tensors of ``compress``.
    """

    compress: Callable[[Tensor, int], Tensors]
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    restore: Callable[[Mapping[str, Tensor], int], Tensor]


def entries(side: int) -> int:
    """How many numbers a symmetric matrix [d, d] is made of."""
    return side * (side + 1) // 2


def _eigenpairs(matrix: Tensor, rank: int) -> Tensors:
    """C(D) = Σ λⱼ vⱼ vⱼᵀ over the R eigenvalues of largest magnitude: no matrix of rank R is nearer to D."""
    values, vectors = eigh(matrix)
    largest = values.abs().topk(min(rank, len(matrix))).indices
    return {"values": values[largest], "vectors": vectors[:, largest]}


def _from_eigenpairs(tensors: Mapping[str, Tensor], side: int) -> Tensor:
    return (tensors["vectors"] * tensors["values"]) @ tensors["vectors"].T


def _largest(matrix: Tensor, number: int) -> Tensors:
    """The K entries of largest magnitude of the lower triangle; each one off the diagonal is two of D's.

    Their places in the triangle are whole numbers as float32, or float64 where that does not tell them apart.
    """
    triangle = lower_triangle(matrix)
    places = triangle.abs().topk(min(number, len(triangle))).indices
    dtype = torch.float32 if len(triangle) <= _EXACT_IN_FLOAT32 else torch.float64
    return {"values": triangle[places], PLACES: places.to(dtype)}


def _from_largest(tensors: Mapping[str, Tensor], side: int) -> Tensor:
    places = tensors[PLACES]
    if not ((places >= 0) & (places < entries(side)) & (places == places.floor())).all():
        raise ReplyError(f"its places are not whole numbers from 0 to {entries(side) - 1}")
    triangle = tensors["values"].new_zeros(entries(side))
    triangle[places.long()] = tensors["values"]
    return symmetric(triangle, side)


COMPRESSORS = {
    "identity": Compressor(
        compress=lambda matrix, _: {"triangle": lower_triangle(matrix)},
        shapes=lambda side, _: {"triangle": (entries(side),)},
        restore=lambda tensors, side: symmetric(tensors["triangle"], side),
    ),
    "rank": Compressor(
        compress=_eigenpairs,
        shapes=lambda side, size: {"values": (min(size, side),), "vectors": (side, min(size, side))},
        restore=_from_eigenpairs,
    ),
    "top": Compressor(
        compress=_largest,
        shapes=lambda side, size: {name: (min(size, entries(side)),) for name in ("values", PLACES)},
        restore=_from_largest,
    ),
}
"""What ``compressor`` names: nothing is left out; rank R; the K largest entries."""
