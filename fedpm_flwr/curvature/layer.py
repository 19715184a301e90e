"""A layer's parameters, seen as the one matrix that its curvature acts on."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import Curvature


@dataclass(frozen=True)
class Block:
    """A layer: the keys of its parameters, in the order of their columns in Δ, and a name for messages.

    Blocks of the same parameters are equal, whatever their names.
    """

    name: str = field(compare=False)
    parameters: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LayerCurvature:
    """A layer's curvature as measured, and the damping λ that the layer was really stepped with."""

    block: Block
    curvature: Curvature
    damping: float


def to_matrix(tensors: Sequence[Tensor]) -> Tensor:
    """Put a layer's parameters side by side: [out, …], [out], … -> [out, columns].

    A weight [out, in] with its bias [out] becomes [out, in + 1], the bias last.

    >>> to_matrix([torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])])
    tensor([[1., 2., 3.]])
    """
    parts = [tensor.reshape(_rows(tensor), _columns(tensor)) for tensor in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def from_matrix(matrix: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Undo ``to_matrix``: the columns of the matrix as tensors of these shapes."""
    widths = [_columns(torch.empty(shape, device="meta")) for shape in shapes]
    parts = torch.split(matrix, widths, dim=1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 1


def _columns(tensor: Tensor) -> int:
    return tensor.numel() // max(_rows(tensor), 1)
