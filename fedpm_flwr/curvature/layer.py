"""A layer's parameters, seen as the one matrix that its curvature acts on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import Curvature


@dataclass(frozen=True)
class Block:
    """A layer: the keys of its parameters, in the order of their columns in Δ, and a name for messages.

    A tied parameter has several keys in a model's state; ``copies`` are pairs of a further key and
    the one in ``parameters`` that it always equals. Blocks of the same keys are equal, whatever their names.
    """

    name: str = field(compare=False)
    parameters: tuple[str, ...]
    copies: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class LayerCurvature:
    """A layer's curvature as measured, and the damping λ that the layer was really stepped with.

    ``packed``: the form in which the curvature has been sent, if it is what has arrived (``wire.Packed``).
    """

    block: Block
    curvature: Curvature
    damping: float
    packed: object = None


def matrix_shape(shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Rows and columns of a layer's Δ, from the shapes of its parameters.

    Parameters that share their first dimension stand side by side: [out, …], [out], … -> [out,
    columns]. Others, as those of a whole model, make one row.

    Examples:
        >>> matrix_shape([(3, 2), (3,)]), matrix_shape([(3, 2), (4,)])
        ((3, 3), (1, 10))
    """
    rows = {shape[0] if len(shape) else 1 for shape in shapes}
    size = sum(math.prod(shape) for shape in shapes)
    if len(rows) == 1 and (number := rows.pop()):
        return number, size // number
    return 1, size


def to_matrix(tensors: Sequence[Tensor]) -> Tensor:
    """A layer's parameters as its Δ [rows, columns], of which ``matrix_shape`` tells the shape.

    A weight [out, in] with its bias [out] becomes [out, in + 1], the bias last.

    Examples:
        >>> to_matrix([torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])])
        tensor([[1., 2., 3.]])
    """
    rows, _ = matrix_shape([tensor.shape for tensor in tensors])
    parts = [tensor.reshape(rows, -1) for tensor in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def from_matrix(matrix: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Undo ``to_matrix``: the columns of the matrix as tensors of these shapes."""
    widths = [math.prod(shape) // len(matrix) for shape in shapes]
    parts = torch.split(matrix, widths, dim=1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
