"""A model's parameters as the one vector [d] of ``Objective``, from its state alone."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..curvature import from_matrix, matrix_shape, to_matrix


def to_vector(state: Mapping[str, Tensor]) -> Tensor:
    """The floating-point entries of a model's state as a vector [d], in ``Objective``'s order.

    A state does not tell parameters from floating-point buffers, frozen ones, or ties: a model that has
    these has fewer entries in its ``Objective``, and its clients' vectors are refused by their size.
    """
    return to_matrix([value for value in state.values() if value.is_floating_point()]).flatten().clone()


def from_vector(vector: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This state with its floating-point entries taken from the vector [d], in their dtypes."""
    keys = [key for key, value in state.items() if value.is_floating_point()]
    shapes = [state[key].shape for key in keys]
    parts = from_matrix(vector.reshape(matrix_shape(shapes)), shapes)
    return {**state, **{key: part.to(state[key].dtype) for key, part in zip(keys, parts, strict=True)}}


def check_whole(model: nn.Module, side: int) -> None:
    """Raise ValueError if the trained parameters [d], d = ``side``, are not all floats of the model's state."""
    floats = sum(value.numel() for value in model.state_dict().values() if value.is_floating_point())
    if side != floats:
        raise ValueError(
            f"the method needs a model whose {floats} floating-point numbers are all trained parameters, not "
            f"{side} of them: no BatchNorm statistics, no frozen and no tied parameters"
        )


def check_side(side: int, largest: int) -> None:
    """Raise ValueError if matrices [d, d] of this side d are not allowed."""
    if side > largest:
        raise ValueError(
            f"matrices of all {side} parameters, more than max-factor-side={largest}: take a smaller model"
        )


def symmetric(triangle: Tensor, side: int) -> Tensor:
    """The symmetric matrix [d, d] of this lower triangle [d(d + 1)/2], which is row by row."""
    matrix = triangle.new_zeros(side, side)
    rows, columns = torch.tril_indices(side, side)
    matrix[rows, columns] = triangle.cpu()
    return matrix + matrix.tril(-1).T


def lower_triangle(matrix: Tensor) -> Tensor:
    """A symmetric matrix [d, d] as ``symmetric`` reads it, [d(d + 1)/2]."""
    rows, columns = torch.tril_indices(len(matrix), len(matrix), device=matrix.device)
    return matrix[rows, columns]
