"""A convolution's input factor as channels ⊗ kernel positions, the nearest such product."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.linalg import at_least_float32
from .layout import Layout, prefixed, without_prefix
from .rounded_factor import RoundedFactor

_CHANNELS, _POSITIONS, _BIAS = "channels", "positions", "bias"
_ROUNDS = 5
_FACTOR = RoundedFactor(torch.int8)


@dataclass(frozen=True)
class Positions:
    """C ⊗ Q with C [channels, channels] and Q [k, k], and the bias's own diagonal number where there is one.

    A's columns are in the order channels, kernel height, kernel width, then the bias; C and Q minimise
    ‖A − C ⊗ Q‖ (Van Loan and Pitsianis 1993). What the bias shares with the inputs is lost, and some of the
    trace: of all codecs of few bits this one alone makes small eigenvalues smaller, not larger.
    """

    k: int

    def layout(self, shape: tuple[int, ...]) -> Layout:
        channels, bias = divmod(shape[-1], self.k)
        if not channels or bias > 1:
            raise ValueError(f"a matrix of side {shape[-1]} is not one of {self.k} kernel positions")
        found = prefixed(_CHANNELS, _FACTOR.layout((*shape[:-2], channels, channels)))
        found |= prefixed(_POSITIONS, _FACTOR.layout((*shape[:-2], self.k, self.k)))
        return found | ({_BIAS: (torch.float32, shape[:-2])} if bias else {})

    def pack(self, part: Tensor) -> dict[str, Tensor]:
        self.layout(tuple(part.shape))  # raises if there is none
        matrix = at_least_float32(part.detach())
        channels, bias = divmod(matrix.shape[-1], self.k)
        inner = matrix[..., : channels * self.k, : channels * self.k]
        # The rounds take squares, which float32 does not have of numbers that A may well be made of.
        unit = inner.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        unit = unit.where(unit > 0, 1.0)
        c, q = nearest_product((inner / unit).reshape(*matrix.shape[:-2], channels, self.k, channels, self.k))
        found = prefixed(_CHANNELS, _FACTOR.pack(c * unit)) | prefixed(_POSITIONS, _FACTOR.pack(q))
        return found | ({_BIAS: matrix[..., -1, -1].to("cpu", torch.float32, copy=True)} if bias else {})

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        channels = shape[-1] // self.k
        c = _FACTOR.unpack(without_prefix(_CHANNELS, tensors), (*shape[:-2], channels, channels))
        q = _FACTOR.unpack(without_prefix(_POSITIONS, tensors), (*shape[:-2], self.k, self.k))
        product = torch.einsum("...ab,...pq->...apbq", c, q)
        matrix = torch.zeros(shape)
        inner = channels * self.k
        matrix[..., :inner, :inner] = product.reshape(*shape[:-2], inner, inner)
        if _BIAS in tensors:
            matrix[..., -1, -1] = tensors[_BIAS]
        return matrix


def nearest_product(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """C [.., c, c] and Q [.., k, k] that minimise ‖A − C ⊗ Q‖, from A [.., c, k, c, k].

    By alternating least squares: each step is a partial inner product with a positive semidefinite matrix,
    so that both stay so.
    """
    q = torch.einsum("...apaq->...pq", matrix)
    c = q.new_zeros(*matrix.shape[:-4], matrix.shape[-4], matrix.shape[-4])
    for _ in range(_ROUNDS):
        c = torch.einsum("...apbq,...pq->...ab", matrix, q) / _square(q)
        q = torch.einsum("...apbq,...ab->...pq", matrix, c) / _square(c)
    return c, q


def _square(matrix: Tensor) -> Tensor:
    found = matrix.square().sum((-2, -1), keepdim=True)
    return found.where(found > 0, 1.0)
